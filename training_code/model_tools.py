"""Models and tokenizers: loading, saving, identity, and the collator of the training texts.

Terms: *identity* = a content hash of all that decides a model's answers; *NF4* = 4-bit storage by bitsandbytes;
*block* = the tokens of one reply, end token included. Follows "The LLM ARChitect" (2024), sections on the model and
its training.
Adapters are made and merged in ``adapter_tools``, vocabularies cut in ``vocabulary_tools``, GGUF files unpacked in
``gguf_models``; the public names of these are public names of this module.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from peft import load_peft_weights
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

import mini_model  # noqa: F401  (registers the embedded model's architecture)
from adapter_tools import (  # noqa: F401  (public names of this module)
    LORA_LAYERS,
    adapter_settings,
    create_lora,
    dequantise,
    fix_dtypes,
    four_bit_layers,
    is_peft_model,
    merge_peft_into_base,
    reset_lora,
    save_base,
    set_peft_weights,
)
from gguf_models import unpack_smollm2  # noqa: F401  (public name of this module)
from unsloth_backend import import_unsloth
from vocabulary_tools import (  # noqa: F401  (public names of this module)
    get_or_map_special_tokens,
    keep_single_char_tokens,
    remove_tokenizer_normalizer,
    save_tokenizer,
    shrink_model_embeddings,
    shrink_tokenizer_vocab,
)

_PADDING_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>")
_UNREADABLE = (
    "{path!r} is not a folder here and could not be fetched from the Hugging Face hub ({error}). Put the model's files "
    "(config.json, tokenizer.json, tokenizer_config.json, *.safetensors) into pretrained_models/{name} "
    "and name that folder."
)


# ---------------------------------------------------------------------------------------------------------- loading


def _local_folder(path, revision=None):
    """Return the folder of a model, fetching it from the hub unless ``path`` is a folder already.

    Raises:
        FileNotFoundError: neither a folder nor to be had from the hub; says where to put the files.
    """
    path = str(path)
    if Path(path).is_dir():
        return Path(path)
    try:
        patterns = ["*.json", "*.safetensors", "tokenizer.model"]
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns, ignore_patterns=["original/*"]))
    except (OSError, ValueError) as error:  # no connection, offline mode, no such repository, not a repository's name
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(_UNREADABLE.format(path=path, error=reason, name=Path(path).name)) from error


def _read_fields(folder, name):
    """Read a configuration file without the nulls in lists of token ids (see ``load_model``); {} without the file."""
    file = folder / name
    if not file.is_file():
        return {}
    fields = json.loads(file.read_text(encoding="utf-8"))
    for key, value in fields.items():
        if key.endswith(("token_id", "token_ids")) and isinstance(value, list):
            fields[key] = [i for i in value if i is not None] or None
    return fields


def _load_configs(folder, path):
    """Return (configuration, generation configuration) of a model folder.

    Raises:
        FileNotFoundError: no config.json. ValueError: an architecture that transformers does not know, or a
            quantisation other than bitsandbytes' 4 bits.
    """
    fields = _read_fields(folder, "config.json")
    if not fields:
        adapter = ("; it holds an adapter: take the merged model, which run_finetuning scripts write beside it "
                   "(...-merged), or load its base, then create_lora and load_peft_state")
        hint = adapter if (folder / "adapter_config.json").is_file() else ""
        raise FileNotFoundError(f"no config.json in {folder}{hint}")
    if fields.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"{folder / 'config.json'}: unknown model_type {fields.get('model_type')!r}")
    config = AutoConfig.for_model(**fields)
    config.name_or_path = str(path)
    stored = getattr(config, "quantization_config", None)
    if stored is not None and not stored.get("load_in_4bit"):
        method = stored.get("quant_method")
        raise ValueError(f"{folder / 'config.json'}: quantised by {method!r}; only 4-bit bitsandbytes can be loaded")
    generation = _read_fields(folder, "generation_config.json")
    return config, GenerationConfig.from_dict(generation) if generation else GenerationConfig.from_model_config(config)


def _load_tokenizer(folder, config):
    """Return a folder's tokenizer, padding on the right with a padding token that always exists.

    Without a padding token of its own it takes the one the model's configuration names, else a token made for padding,
    else the end token.
    """
    if (folder / "tokenizer.json").is_file():  # the file is the truth; tokenizer classes rebuild parts of it
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, clean_up_tokenization_spaces=False)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, clean_up_tokenization_spaces=False)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        named = {i: token for token, i in vocabulary.items()}.get(config.pad_token_id)
        made_for_it = next((token for token in _PADDING_TOKENS if token in vocabulary), None)
        tokenizer.pad_token = named or made_for_it or tokenizer.eos_token
    return tokenizer


def _four_bit_config(dtype):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _half_dtype(device):
    """Return the 16-bit dtype that a device computes in."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def load_model(path, bits=16, backend="transformers", device=None, revision=None):
    """Load a causal language model and its tokenizer.

    Checkpoints of the published system are taken as they are: nulls among the end tokens, fields of older versions,
    left padding. Files are never changed. A checkpoint stored as NF4 loads with any number of bits; with 16 or 32 it is
    unpacked once.

    Args:
        path: folder, or name on the Hugging Face hub.
        bits: 4 (NF4 with double quantisation; computes in bf16 on a GPU, fp32 on a CPU), 16 (bf16) or 32 (fp32). On
            a GPU that does not compute in bf16 (T4, V100) float16 takes its place.
        backend: 'transformers', or 'unsloth' for training with unsloth (4 or 16 bits, GPU only).
        device: torch device; None takes the GPU if there is one.
        revision: branch, tag or commit on the hub.

    Returns:
        (model in evaluation mode, tokenizer padding on the right).

    Raises:
        FileNotFoundError: nothing at ``path``. ValueError: other bits or backends, unknown architectures.
    """
    if bits not in (4, 16, 32) or backend not in ("transformers", "unsloth"):
        raise ValueError(f"bits={bits!r}, backend={backend!r}: bits are 4, 16 or 32, backends transformers or unsloth")
    folder = _local_folder(path, revision)
    if backend == "unsloth":
        if bits == 32:
            raise ValueError("the unsloth backend loads models in 4 or 16 bits: use these or backend='transformers'")
        return _load_unsloth(folder, bits)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config, generation_config = _load_configs(folder, path)
    tokenizer = _load_tokenizer(folder, config)
    dtype = _half_dtype(device) if bits == 16 or (bits == 4 and device.type == "cuda") else torch.float32
    stored = getattr(config, "quantization_config", None)
    options = {"device_map": {"": str(torch.empty(0, device=device).device)}}  # by number: accelerate looks at it
    if stored is not None:
        config.quantization_config = {**stored, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
    elif bits == 4:
        options["quantization_config"] = _four_bit_config(dtype)
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, generation_config=generation_config, dtype=dtype, **options
    )
    if stored is not None and bits != 4:
        dequantise(model, dtype)
    for module in four_bit_layers(model).values():
        module.weight.quant_state.dtype = dtype
        module.support_avx512bf16_for_cpu = False  # would repack the weights in place at the first answer
    if config.tie_word_embeddings and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False  # stored with a head of its own in spite of its configuration
    for part in (model.config, model.generation_config):
        part.pad_token_id = tokenizer.pad_token_id
    return _trainable_padding(model).eval(), tokenizer


def _trainable_padding(model):
    """Let the embedding of the padding token be trained like any other: it can be the end token too."""
    model.get_input_embeddings().padding_idx = None
    return model


def load_unsloth_4bit(model_path, local_files_only=False):
    """Load a model in 4 bits, and its tokenizer, through unsloth, for sequences as long as the model allows.

    Raises:
        ImportError: unsloth is not installed, finds no GPU, or does not support the version of an installed package.

    Source: published ``load_unsloth_4bit``; differs: unsloth's default of 2,048 tokens is not taken.
    """
    return _load_unsloth(model_path, 4, local_files_only)


def _load_unsloth(path, bits, local_files_only=False):
    fast_language_model = import_unsloth()
    limit = _read_fields(_local_folder(path), "config.json").get("max_position_embeddings", 131072)
    model, tokenizer = fast_language_model.from_pretrained(
        model_name=str(path),
        max_seq_length=limit,
        dtype=None,
        load_in_4bit=bits == 4,
        local_files_only=local_files_only,
    )
    return _trainable_padding(model), tokenizer


def load_tokenizer(path):
    """Load the tokenizer of a model (folder or hub name), as ``load_model`` does."""
    folder = _local_folder(path)
    return _load_tokenizer(folder, _load_configs(folder, path)[0])


def save_model_and_tokenizer(path, model, tokenizer):
    """Save a model, or the adapter of a PEFT model, with its tokenizer into a folder.

    Source: published ``save_model_and_tokenizer``.
    """
    path = Path(path)
    if is_peft_model(model):
        model.save_pretrained(path, save_embedding_layers=False)  # trained ones are part of the adapter anyway
    else:
        model.save_pretrained(path, save_original_format=False)  # the original of NF4 weights cannot be written
    save_tokenizer(path, tokenizer)


def get_and_fix_peft_weights(path):
    """Read the weights of a saved adapter under the names that ``set_peft_weights`` expects.

    Older saves name embeddings and head several times: trained (``.modules_to_save.``), original
    (``.original_module.``) and plain; some keep the adapter's name (``.default.``). The plain name stays; its value is
    the plain one if there is one, else the trained one.

    Returns:
        {name: tensor on the CPU}.

    Source: published ``get_and_fix_peft_weights``.
    """
    weights = {}
    stored = load_peft_weights(str(_local_folder(path)), device="cpu")
    for name in sorted(stored, key=lambda name: "modules_to_save" not in name):  # plain names come last, and win
        if ".original_module." in name:
            continue
        plain = re.sub(r"\.(lora_[AB]|lora_embedding_[AB])\.default\b", r".\1", name)
        weights[re.sub(r"\.modules_to_save(\.default)?\.", ".", plain)] = stored[name]
    return weights


def load_peft_state(model, path):
    """Load a saved adapter (folder or hub name) into a PEFT model. Source: published ``load_peft_state``."""
    set_peft_weights(model, get_and_fix_peft_weights(path))


# --------------------------------------------------------------------------------------------- identity, positions

_CHUNK = 1 << 22  # 32-bit words hashed at a time
_CHUNK_FACTOR = 0x5851F42D4C957F2D  # odd, so that no chunk's hash is lost


def _word_factors(count, device):
    """Return an odd 64-bit factor for each of ``count`` places, (count,) int64: products wrap around modulo 2^64."""
    places = torch.arange(1, count + 1, dtype=torch.int64, device=device)
    mixed = places * 0x2545F4914F6CDD1D
    mixed = (mixed ^ (mixed >> 29)) * 0x369DEA0F31A53F85
    return (mixed ^ (mixed >> 32)) | 1


def _hash_bits(tensor, factors):
    """Return a 0-dim int64 hash of a tensor's raw bits: any one word changed, or two swapped, change it."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.numel() % 4 or data.storage_offset() % 4:
        data = torch.cat([data, data.new_zeros(-data.numel() % 4)])
    result = torch.zeros((), dtype=torch.int64, device=data.device)
    for words in data.view(torch.int32).split(_CHUNK):
        result = result * _CHUNK_FACTOR + (words.long() * factors[: words.numel()]).sum()
    return result


def _named_bits(model):
    """Yield (name, tensor) of all tensors that decide a model's answers, the parts of NF4 weights included."""
    for name, parameter in model.named_parameters():
        yield name, parameter.data
    for name, layer in four_bit_layers(model).items():
        state = layer.weight.quant_state
        for level, part in (("", state), ("nested_", state.state2)):
            for field in ("absmax", "code", "offset"):
                value = getattr(part, field, None)
                if value is not None:
                    yield f"{name}.{level}{field}", torch.as_tensor(value)
        yield f"{name}.dtype", torch.empty(0, dtype=state.dtype)


# fields of a configuration that leave the answers alone, or that the hashed tensors stand for already
_NO_ANSWERS = {"architectures", "dtype", "torch_dtype", "quantization_config", "tie_word_embeddings", "use_cache"}
_NO_ANSWERS |= {"eos_token_id", "pad_token_id"}  # a training may set them to the tokenizer's


def _deciding_fields(value, ignored):
    """Return the fields of a configuration, nested ones too, that can decide answers: no names, paths and versions."""
    if not isinstance(value, dict):
        return value
    return {
        name: _deciding_fields(entry, ignored)
        for name, entry in value.items()
        if name not in ignored and not name.startswith("_") and not name.endswith(("_version", "name_or_path"))
    }


def _config_line(model):
    """Return a model's configuration (rotary base, norm's epsilon...) as one line of canonical JSON; '' without one."""
    config = getattr(model, "config", None)
    if config is None:
        return ""
    # only positions of a model's own (Mini) look for the token that begins texts
    ignored = _NO_ANSWERS if hasattr(model, "get_position_ids") else _NO_ANSWERS | {"bos_token_id"}
    return json.dumps(_deciding_fields(json.loads(config.to_json_string()), ignored), sort_keys=True)


@torch.no_grad()
def model_identity(model):
    """Hash the content of a model: names, shapes, dtypes and every bit of its weights, adapter (its scaling
    too) and NF4 states included, and the fields of its configuration that can decide an answer.

    Integer arithmetic on the model's own device (about one pass over the weights), so the result is the same in every
    process and after saving and loading in the same format. Part of every cache key.

    Returns:
        str of 64 hexadecimal digits.
    """
    factors, digests, described = {}, {}, []
    tensors = list(_named_bits(model))
    longest = min(_CHUNK, max(tensor.nbytes for _, tensor in tensors) // 4 + 1)
    for name, tensor in tensors:
        if tensor.device not in factors:
            factors[tensor.device] = _word_factors(longest, tensor.device)
        digests.setdefault(tensor.device, []).append(_hash_bits(tensor, factors[tensor.device]))
        described.append((name, tuple(tensor.shape), str(tensor.dtype), tensor.device, len(digests[tensor.device]) - 1))
    numbers = {device: torch.stack(hashes).tolist() for device, hashes in digests.items()}  # one transfer per device
    lines = sorted(f"{name} {shape} {dtype} {numbers[device][i]}" for name, shape, dtype, device, i in described)
    lines += [*adapter_settings(model), _config_line(model)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def position_ids(model, input_ids):
    """Return the positions (B, T) long of the tokens of whole sequences ``input_ids`` (B, T).

    A model with positions of its own (Mini) is asked for them; others count tokens.
    """
    own = getattr(model, "get_position_ids", None)
    if own is not None:
        return own(input_ids)
    return torch.arange(input_ids.shape[-1], device=input_ids.device).expand_as(input_ids)


def position_rule(model):
    """Return the function (position, token, next token) -> position of the next token, all ints.

    It does by steps what ``position_ids`` does for whole sequences.
    """
    own = getattr(model, "position_rule", None)
    return own() if own is not None else lambda position, token, next_token: position + 1


# --------------------------------------------------------------------------------------------------------- collator


def _find(ids, template):
    """Return the places (in order) at which the token ids ``template`` begin in ``ids``, both (T,) arrays."""
    places = len(ids) - len(template) + 1
    if places <= 0:
        return np.zeros(0, dtype=np.int64)
    hit = np.ones(places, dtype=bool)
    for offset, token in enumerate(template):
        hit &= ids[offset : offset + places] == token
    return np.flatnonzero(hit)


class InputMaskingDataCollator:
    """Pad training texts on the right into a batch whose labels are the replies alone.

    A reply begins after ``response_template`` and goes through the end token, at most to the next
    ``instruction_template``::

        tokens  <s> A B C I 1 2 O 3 4 \\n </s> I 5 O 6 \\n </s> <pad>
        labels   -  - - - - - - - 3 4 \\n </s> - - - 6 \\n </s>   -
        with mask_first_n_examples=1: only the second reply

    Padding is told by its place, so an end token that serves as padding token too stays a label. Nothing is cut.

    Args:
        instruction_template: text in front of every query (``query_beg`` of the format).
        response_template: text in front of every reply (``reply_beg``).
        tokenizer: with a padding token.
        mlm: must be False; taken because the published class has it.
        mask_first_n_examples: so many replies of each text are no labels, but never its last one.

    Raises:
        ValueError: mlm=True, or a template that is no sequence of tokens.

    Source: published ``InputMaskingDataCollator``; differs: a text without reply is an error instead of a warning.
    """

    def __init__(self, instruction_template, response_template, tokenizer, mlm=False, mask_first_n_examples=0):
        if mlm:
            raise ValueError("mlm=True: replies are predicted token by token, mlm has to be False")
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token: set tokenizer.pad_token")
        self.tokenizer = tokenizer
        self.mask_first_n_examples = mask_first_n_examples
        self.instruction_template = instruction_template
        self.response_template = response_template
        self._instruction_ids = self._template_ids(instruction_template)
        self._response_ids = self._template_ids(response_template)

    def _template_ids(self, template):
        """Tokenize a template as it is tokenized inside a text, without what a tokenizer puts in front of a text."""

        def encode(text):
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

        ids, before, both = encode(template), encode("0"), encode("0" + template)
        if both[: len(before)] == before:
            ids = both[len(before) :]
        if not ids or self.tokenizer.unk_token_id in ids:
            raise ValueError(f"the template {template!r} cannot be written in the tokenizer's vocabulary")
        return ids

    def _blocks(self, ids, index):
        """Return [(start, end)] of the replies in the tokens ``ids`` (T,) of text number ``index``."""
        starts = _find(ids, self._response_ids) + len(self._response_ids)
        queries = np.append(_find(ids, self._instruction_ids), len(ids))
        blocks, end = [], 0
        for start in starts:
            if start >= end:
                end = int(queries[np.searchsorted(queries, start)])
                stop = np.flatnonzero(ids[start:end] == self.tokenizer.eos_token_id)
                blocks.append((int(start), int(start + stop[0] + 1) if len(stop) else end))
        if not blocks:
            beginning = self.tokenizer.decode(ids[:60])
            raise ValueError(
                f"text {index} of the batch has no reply: {self.response_template!r} (tokens {self._response_ids}) "
                f"does not occur in {beginning!r}... Use the format that the texts were made with"
            )
        return blocks

    def torch_call(self, examples):
        """Make a batch of ``examples``, a list of dicts with ``input_ids`` (T,); other fields are ignored.

        Returns:
            BatchEncoding of ``input_ids``, ``attention_mask``, ``labels``, each (B, longest T) long.
        """
        texts = [np.asarray(example["input_ids"], dtype=np.int64) for example in examples]
        shape = (len(texts), max(map(len, texts)))
        input_ids = np.full(shape, self.tokenizer.pad_token_id, dtype=np.int64)
        attention_mask, labels = np.zeros(shape, dtype=np.int64), np.full(shape, -100, dtype=np.int64)
        for row, ids in enumerate(texts):
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
            blocks = self._blocks(ids, row)
            for start, end in blocks[min(self.mask_first_n_examples, len(blocks) - 1) :]:
                labels[row, start:end] = ids[start:end]
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return BatchEncoding({name: torch.from_numpy(array) for name, array in batch.items()})

    __call__ = torch_call
