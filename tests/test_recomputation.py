"""How many layers recompute their activations, and that it changes nothing but memory."""

import math

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from recomputation import PART_OF_IT, Recomputation
from small_models import small_model


@pytest.mark.parametrize(("tokens", "share", "expected"), [
    (100, 1.0, 0), (101, 1.0, 2), (125, 1.0, 4), (200, 1.0, 7), (899, 1.0, 10), (1000, 1.0, 10), (10**6, 1.0, 10),
    (50, 0.5, 0), (51, 0.5, 2), (100, 0.5, 7), (0, 0.5, 0),
])  # fmt: skip
def test_as_many_layers_as_memory_demands(tokens, share, expected):
    """10 bytes a token, 1 where all ten layers recompute, 1,000 bytes in all; not all of them if some recompute."""
    recomputation = Recomputation([None] * 10, kept=10.0, recomputed=1.0, free=1000.0)
    layers = recomputation.layers_for(tokens, share)
    assert layers == expected and recomputation.keeps_all(share) == share * 100
    if 0 < layers < 10:
        taken = [tokens * (10 - 9 * n / 10) for n in (layers - 1, layers)]
        assert taken[1] <= PART_OF_IT * share * 1000 < taken[0]


def test_what_was_too_much_to_be_measured_is_recomputed_whole():
    for kept, recomputed, free in ((math.inf, 1.0, 1e9), (math.inf, math.inf, 1e9), (10.0, 10.0, 5.0),
                                   (10.0, 12.0, 5.0), (10.0, 1.0, -5.0)):  # fmt: skip
        recomputation = Recomputation([None] * 10, kept, recomputed, free)
        assert recomputation.layers_for(1) == 10 and recomputation.keeps_all() == 0


def test_what_recomputing_takes_is_measured_only_if_it_is_needed(capsys):
    model, asked = small_model(), []

    def per_token():
        asked.append([layer.gradient_checkpointing for layer in model.model.layers])
        return 2.0**20 * (1 if all(asked[-1]) else 4)

    found = Recomputation.measured(model, 512, per_token, lambda: 2.0**31)
    assert asked == [[False, False]] and found.layers_for(512) == 0 and not capsys.readouterr().out
    found = Recomputation.measured(model, 1024, per_token, lambda: 2.0**31)
    assert asked[1:] == [[False, False], [True, True]] and found.recomputed == 2.0**20
    told = capsys.readouterr().out
    assert "would need 4.0 GiB, 2.0 GiB are free for it; one of up to 512 tokens keeps all" in told
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


def test_a_model_whose_layers_cannot_is_told_nothing(capsys):
    found = Recomputation.measured(nn.Linear(2, 2), 10, lambda: 10.0, lambda: 30.0)
    assert found.layers == [] and found.layers_for(10) == 0 and not capsys.readouterr().out


def test_the_first_layers_run_twice_and_gradients_stay():
    model = small_model().train()
    tokens, runs, gradients = torch.tensor([[1, 2, 3, 4, 5]]), [0, 0], []
    for i, layer in enumerate(model.model.layers):
        def count(*_, i=i):
            runs[i] += 1

        layer.mlp.register_forward_pre_hook(count)
    recomputation = Recomputation.measured(model, 10, lambda: 10.0, lambda: 30.0)
    counts = []
    for n_layers in (0, 1, 2, 0):
        recomputation.use(n_layers)
        runs[:] = [0, 0]
        model.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        counts.append(tuple(runs))
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert counts == [(1, 1), (2, 1), (2, 2), (1, 1)]
    assert all(torch.equal(a, b) for others in gradients[1:] for a, b in zip(gradients[0], others, strict=True))


def test_random_numbers_are_drawn_alike():
    class Layer(GradientCheckpointingLayer):
        def __init__(self):
            super().__init__()
            self.linear, self.drop = nn.Linear(64, 64), nn.Dropout(0.5)

        def forward(self, states):
            self.mask = self.drop(torch.ones_like(states))  # of the last run
            return self.linear(states * self.mask)

    layer = Layer().train()
    recomputation = Recomputation.measured(nn.Sequential(layer), 10, lambda: 10.0, lambda: 30.0, dropout=True)
    recomputation.use(1)
    loss = layer(torch.ones(2, 64, requires_grad=True)).sum()
    mask = layer.mask.clone()
    loss.backward()
    assert torch.equal(layer.mask, mask) and 0 < float((mask == 0).float().mean()) < 1
