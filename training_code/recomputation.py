"""Recompute activations in the backward pass (gradient checkpointing), in no more layers than a pass's memory demands.

The first layers of a model do it: when the backward pass comes to them, the activations that the others kept are gone.
How much a layer keeps is measured by a pass when a training begins; before every pass its length decides.

Source: activation recomputation as in transformers' layers; which ones is decided here.
"""

import functools
import math
from dataclasses import dataclass

from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

PART_OF_IT = 0.9  # of the memory for a pass, taken where it is filled: lengths differ, so gaps are left between tensors


@dataclass(frozen=True)
class Recomputation:
    """Layers that can recompute their activations, and what these take.

    kept: bytes per token of a pass in which all layers keep them, infinity where not even a short pass fitted;
    recomputed: the same if all layers recompute them; free: bytes that a pass may take.
    """

    layers: list
    kept: float
    recomputed: float
    free: float

    @classmethod
    def measured(cls, model, longest, per_token, free, dropout=False, share=1.0):  # noqa: PLR0913
        """Measure a model, whose layers stay as they are until `prepare` says something else.

        longest: tokens of the longest pass; what recomputing takes is measured only if it does not fit otherwise.
        per_token: function that runs a pass and returns its bytes per token, infinity if there were not enough; free:
        function that returns the bytes free for activations; dropout: whether the model draws random numbers; share: of
        the free bytes that a pass may take.
        """
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        new = cls(layers, per_token(), math.inf, free())
        if not layers or new.layers_for(longest, share) == 0:
            return new
        for layer in layers:
            layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False,
                                                                   preserve_rng_state=dropout)  # fmt: skip
        new.use(len(layers))
        new = cls(layers, new.kept, per_token(), new.free)
        new.use(0)
        needs = f"{longest * new.kept / 2**30:.1f} GiB" if math.isfinite(new.kept) else "more"
        free_gib = share * max(0.0, new.free) / 2**30
        tqdm.write(f"activations are recomputed where memory demands it: a pass of {longest} tokens would need {needs}"
                   f", {free_gib:.1f} GiB are free for it; one of up to {new.keeps_all(share)} tokens keeps all")
        return new

    def keeps_all(self, share=1.0):
        """Return the tokens of the longest pass in which no layer has to recompute; share: of the free bytes."""
        return int(max(0.0, share * self.free) / self.kept)

    def layers_for(self, tokens, share=1.0):
        """Return how many layers a pass of so many tokens has to recompute; share: of the free bytes it may take."""
        if tokens * self.kept <= share * self.free:
            return 0
        missing = tokens * self.kept - PART_OF_IT * share * self.free
        saved = tokens * (self.kept - self.recomputed)  # by all layers
        if not missing < saved < math.inf:
            return len(self.layers)
        return math.ceil(len(self.layers) * missing / saved)

    def use(self, n_layers):
        """Let the first so many layers recompute from now on, and no others."""
        for i, layer in enumerate(self.layers):
            layer.gradient_checkpointing = i < n_layers

    def prepare(self, tokens, share=1.0):
        """Let the next pass, of so many tokens, recompute what it has to, see `layers_for`."""
        self.use(self.layers_for(tokens, share))
