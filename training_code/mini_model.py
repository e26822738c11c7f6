"""Mini: the small language model that ships with this project, its tokenizer and its prompt format.

A standard Llama decoder (same modules, same names, so LoRA, 4-bit storage and merging work as on any Llama) with one
difference: rotary positions count grids, rows and columns instead of tokens. Importing this module registers the
architecture, so that ``AutoModelForCausalLM.from_pretrained`` loads Mini without trusting remote code.

Terms: *position* = one integer per token that packs (grid number, row, column); *marker* = the token ``I`` or ``O``
that opens an input or output grid.
"""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
VOCABULARY = [PAD, BOS, EOS, *"0123456789", "\n", "I", "O"]  # 16 tokens, the id is the place in the list

# Shorter than the published format (no alphabet in front, 'O' for '+/-=O'): Mini learns from nothing, so there is no
# pretrained meaning of letters to build on. The reply tokens (digits, line ends, end token) map one to one.
MINI_FORMAT = {
    "preprompt": "",
    "query_beg": "I",
    "reply_beg": "\nO",
    "reply_end": "\n" + EOS,
    "lines_sep": "\n",
    "max_tokens": 16384,
}

_PACK = 64  # rows and columns are packed with 6 bits each; a grid needs 31 of the 64 values


class MiniConfig(LlamaConfig):
    """Configuration of Mini: Llama's fields plus the ids that positions are read from and the rotary split."""

    model_type = "arc_mini"

    bos_token_id: int | None = VOCABULARY.index(BOS)
    eos_token_id: int | list[int] | None = VOCABULARY.index(EOS)
    pad_token_id: int | None = VOCABULARY.index(PAD)
    newline_token_id: int = VOCABULARY.index("\n")
    marker_token_ids: list[int] | None = None
    rotary_pairs: list[int] | None = None
    rotary_bases: list[float] | None = None

    def __post_init__(self, **kwargs):
        if self.marker_token_ids is None:
            self.marker_token_ids = [VOCABULARY.index("I"), VOCABULARY.index("O")]
        if self.rotary_bases is None:
            self.rotary_bases = [1000.0, 100.0, 100.0]
        super().__post_init__(**kwargs)
        if self.rotary_pairs is None:  # of 32 rotation pairs: 12 for the grid number, 10 for the row, 10 for the column
            side = self.head_dim // 2 * 10 // 32
            self.rotary_pairs = [self.head_dim // 2 - 2 * side, side, side]


class MiniRotaryEmbedding(nn.Module):
    """Rotary angles from packed (grid, row, column) positions; holds no weights and no buffers."""

    def __init__(self, config):
        super().__init__()
        self.pairs, self.bases = tuple(config.rotary_pairs), tuple(config.rotary_bases)

    @torch.no_grad()
    def forward(self, x, position_ids):
        """Return cos and sin, each (B, T, head_dim) in the dtype of ``x``, for packed positions (B, T)."""
        axes = (position_ids // _PACK**2, position_ids // _PACK % _PACK, position_ids % _PACK)
        angles = []
        for axis, pairs, base in zip(axes, self.pairs, self.bases, strict=True):
            frequencies = base ** (-torch.arange(pairs, device=position_ids.device, dtype=torch.float32) / pairs)
            angles.append(axis[..., None].float() * frequencies)
        angles = torch.cat(angles * 2, dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class MiniModel(LlamaModel):
    """Llama's decoder stack with Mini's rotary positions."""

    config_class = MiniConfig

    def __init__(self, config):
        super().__init__(config)
        self.rotary_emb = MiniRotaryEmbedding(config)


class MiniForCausalLM(LlamaForCausalLM):
    """Mini with its language-model head."""

    config_class = MiniConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = MiniModel(config)
        self.post_init()

    def get_position_ids(self, input_ids):
        """Work out the packed position of every token.

        A marker stands at row 0, column 0 of the next grid; cells count from (1, 1); a line end stands at column
        width + 1; the end token at (height + 1, 1). The count starts anew at every ``<s>``, so packed sequences need no
        extra care. Rows and columns over 63, which no grid has, stay at 63.

        Args:
            input_ids: (B, T) whole sequences from their first token on.

        Returns:
            (B, T) long: ``(grid * 64 + row) * 64 + column``.
        """
        config = self.config
        place = torch.arange(input_ids.shape[-1], device=input_ids.device).expand_as(input_ids)
        marker = (input_ids[..., None] == torch.tensor(config.marker_token_ids, device=input_ids.device)).any(-1)
        newline = input_ids == config.newline_token_id
        first = (input_ids == config.bos_token_id) | (place == 0)

        def since(event, count):
            """Return ``count`` less its value at the latest event."""
            latest = torch.where(event, place, 0).cummax(-1).values
            return count - count.gather(-1, latest)

        grid = since(first, marker.long().cumsum(-1))
        lines = newline.long().cumsum(-1) - newline.long()  # line ends before each token
        row = since(marker, lines) + 1
        breaks = torch.where(marker | newline, place, 0).cummax(-1).values
        column = place - torch.cat([torch.zeros_like(breaks[..., :1]), breaks[..., :-1]], dim=-1)
        inside = ~marker & (grid > 0)
        row, column = (torch.where(inside, axis, 0).clamp(max=_PACK - 1) for axis in (row, column))
        return (grid * _PACK + row) * _PACK + column

    def position_rule(self):
        """Return the function (position, token, next token) -> packed position of the next token, all ints:
        ``get_position_ids`` by steps."""
        begin, newline, markers = self.config.bos_token_id, self.config.newline_token_id, self.config.marker_token_ids
        markers, last = frozenset(markers), _PACK - 1  # attributes of a configuration are slow

        def next_position(position, token, next_token):
            if next_token == begin:
                return 0
            if next_token in markers:
                return (position // _PACK**2 + 1) * _PACK**2
            if position < _PACK**2:
                return 0
            if token in markers:
                return position // _PACK**2 * _PACK**2 + _PACK + 1
            if token != newline:
                return position + 1 if position % _PACK < last else position
            below = position - position % _PACK + 1
            return below + _PACK if position // _PACK % _PACK < last else below

        return next_position

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        """Run the decoder; as ``LlamaForCausalLM.forward``, with positions worked out from whole sequences.

        Raises:
            ValueError: without ``position_ids`` when a cache already holds the beginning of the sequence (positions
                depend on all tokens so far: pass a slice of ``get_position_ids(whole sequence)``).
        """
        if position_ids is None:
            if input_ids is None or (past_key_values is not None and past_key_values.get_seq_length() > 0):
                raise ValueError("Mini's positions depend on the whole sequence: pass position_ids with a cache")
            position_ids = self.get_position_ids(input_ids)
        if attention_mask is None and past_key_values is None and input_ids is not None:
            # transformers takes jumps in the positions for borders of packed sequences unless there is a mask
            attention_mask = torch.ones_like(input_ids)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        """Hand ``generate`` the positions of the whole sequence; the base class cuts them to the new tokens."""
        kwargs["position_ids"] = self.get_position_ids(input_ids)
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


AutoConfig.register(MiniConfig.model_type, MiniConfig)
AutoModelForCausalLM.register(MiniConfig, MiniForCausalLM)


def make_tokenizer():
    """Make Mini's tokenizer: one token per character, ``<s>`` in front, padding on the right."""
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(VOCABULARY)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    core.decoder = decoders.Fuse()
    bos = VOCABULARY.index(BOS)
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="right",
        clean_up_tokenization_spaces=False, model_max_length=MINI_FORMAT["max_tokens"],
    )  # fmt: skip


@dataclass(frozen=True)
class MiniSize:
    """Size of a Mini; the defaults have about 38.6 million parameters."""

    layers: int = 12
    hidden_size: int = 512
    heads: int = 8
    intermediate_size: int = 1408


def make_model(size=MiniSize(), seed=0):
    """Make a randomly initialised Mini in fp32; the caller's random state is left alone."""
    config = MiniConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.intermediate_size,
        max_position_embeddings=MINI_FORMAT["max_tokens"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MiniForCausalLM(config)
