"""Small models for tests: scripted ones, whose true answers are known, and random ones that tell tokens apart."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from conftest import make_bpe_tokenizer, make_tiny_llama
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import model_tools
import search
from mini_model import MiniConfig, MiniForCausalLM, make_tokenizer
from tree_memory import Room


class ScriptedModel(torch.nn.Module):
    """A fake causal model: a function from all tokens so far to logits. It sees cached tokens in a real cache only."""

    def __init__(self, logits_of):
        super().__init__()
        self.logits_of, self.calls = logits_of, 0
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.device = self.weight.device

    def forward(self, input_ids, position_ids=None, past_key_values=None, use_cache=None,  # noqa: PLR0913
                logits_to_keep=0, tree_store=None, attention_mask=None):  # fmt: skip
        assert input_ids.shape[0] == 1 and not torch.is_grad_enabled()
        self.calls += 1
        tokens = input_ids[0].tolist()
        if tree_store is not None:
            prefixes = tree_store.prefixes(tokens, position_ids[0].tolist())
            logits = torch.stack([torch.as_tensor(self.logits_of(prefixes[i])) for i in logits_to_keep.tolist()])
            return SimpleNamespace(logits=logits[None].float())
        if past_key_values is not None:
            states = input_ids.view(1, 1, -1, 1).float()
            tokens = past_key_values.update(states, states, 0)[0].long().flatten().tolist()
            assert position_ids[0].tolist() == list(range(len(tokens) - input_ids.shape[1], len(tokens)))
        rows = range(len(tokens) - (logits_to_keep or input_ids.shape[1]), len(tokens))
        logits = torch.stack([torch.as_tensor(self.logits_of(tuple(tokens[: i + 1]))) for i in rows])
        return SimpleNamespace(logits=logits[None].float(), past_key_values=past_key_values)


class TokenStore:
    """A store for scripted models: keeps tokens instead of keys and values, and tells what every row attends to."""

    grows_in_place = True

    def __init__(self, slots):
        self.total = self.free = slots

    def open(self, prompt, length):
        if length > self.free:
            return None
        self.free -= length
        return SimpleNamespace(prompt=prompt, capacity=length, tokens={})

    def grow(self, view, length):
        if length - view.capacity > self.free:
            return False
        self.free -= length - view.capacity
        view.capacity = length
        return True

    def close(self, view):
        self.free += view.capacity
        view.capacity = 0

    def prepare(self, chains):
        self.chains = chains

    def prefixes(self, tokens, positions):
        """Return for each row of the pass the tokens that it attends to, its own included."""
        tokens, rows = iter(tokens), []
        for chain in self.chains:
            assert chain.start + chain.length <= chain.view.capacity
            for place in range(chain.start, chain.start + chain.length):
                assert place not in chain.view.tokens, "a slot is written once"
                chain.view.tokens[place] = next(tokens)
                seen = [*range(min(chain.view.prompt, chain.start)), *chain.path.tolist()]
                seen += range(chain.start, place + 1)
                rows.append(tuple(chain.view.tokens[i] for i in seen))
        assert next(tokens, None) is None and [len(row) - 1 for row in rows] == positions
        return rows


def serve_scripted_models(monkeypatch, slots=10**6, rows=512):
    """Let the engine run scripted models, in a memory of so many slots."""
    monkeypatch.setattr(search, "choose_room", lambda *_: Room(slots, rows, "as the test says"))
    monkeypatch.setattr(search, "slot_bytes", lambda model: 1)
    monkeypatch.setattr(search, "make_store", lambda model, slots: TokenStore(slots))
    monkeypatch.setattr(search, "attention_window", lambda model: None)
    monkeypatch.setattr(search, "tree_mode", lambda model: nullcontext())


class CopyModel(ScriptedModel):
    """Answers every query with the query itself (60 %), the query turned half (25 %), or no grid at all (15 %).

    Copying and half turns look the same in every view, so the true candidates and their NLL are known.
    """

    def __init__(self, shares=(0.6, 0.25, 0.15)):
        self.tokenizer, self.shares = make_tokenizer(), shares
        super().__init__(self.next_logits)

    def replies(self, prompt):
        rows = prompt.rpartition("I")[2].removesuffix("\nO").split("\n")
        turned = [row[::-1] for row in rows[::-1]]
        texts = ["\n".join(rows) + "\n</s>", "\n".join(turned) + "\n</s>", "\n</s>"]
        return dict(zip(texts, self.shares, strict=True))

    def next_logits(self, prefix):
        prompt, mark, begun = self.tokenizer.decode(list(prefix)).removeprefix("<s>").rpartition("O")
        weights = np.full(16, 1e-9)
        for reply, share in self.replies(prompt + mark).items():
            if reply.startswith(begun) and reply != begun:
                rest = reply[len(begun) :]
                token = "</s>" if rest.startswith("<") else rest[0]
                weights[self.tokenizer.convert_tokens_to_ids(token)] += share
        return np.log(weights / weights.sum())


def small_model(vocab=6, seed=0, kinds=(LlamaConfig, LlamaForCausalLM)):
    """Make a random model in fp32 whose predictions differ clearly from token to token."""
    config = kinds[0](vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                      num_attention_heads=2, num_key_value_heads=2, initializer_range=0.4)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kinds[1](config).eval()


def small_mini(seed=0):
    """Make a pair (random Mini, its tokenizer of one token per character)."""
    return small_model(16, seed, (MiniConfig, MiniForCausalLM)), make_tokenizer()


def closing(model, tokenizer, strength=4):
    """Make the end token more likely, so that random models finish their replies."""
    with torch.no_grad():
        head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=True)
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()[tokenizer.eos_token_id] = head.weight.norm(dim=1).mean() * strength
    model.lm_head = head
    return model, tokenizer


KEPT = list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!?.:,;*+/-=")
FORMAT_TEXT = "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghjklmnpqrstuvwxyzI12\n34\n+/-=O56\n78\n"


def shrink(model, tokenizer):
    return model_tools.keep_single_char_tokens(model, tokenizer, keep=KEPT + tokenizer.tokenize("\n"), remove_unk=True)


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(ids)[None]).logits[0].float()


def small_pair(tied=False):
    tokenizer = make_bpe_tokenizer()
    model = make_tiny_llama(tokenizer, tied=tied)
    shrink(model, tokenizer)
    return model, tokenizer


def ids_of(tokenizer):
    return tokenizer(FORMAT_TEXT)["input_ids"]


def smol_style():
    """Byte-level BPE that cuts digits apart and inserts no start token; start, unknown and padding share a token."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "ab"]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("Ġ", "a"), ("a", "b")]))
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    core.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<|endoftext|>", bos_token="<|im_start|>", eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )  # fmt: skip


def mistral_style():
    """SentencePiece-like BPE with byte fallback: the line end is the token <0x0A>, spaces are ``▁``."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *KEPT, "ab", "▁a"]
    vocabulary = {t: i for i, t in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(strip)
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
