"""LoRA adapters and number formats: make, reset, save names, merge; NF4 weights unpacked; dtypes put right.

Terms: *base* = a model without adapter; *adapter* = LoRA matrices on the projections together with embeddings and head
trained in full (``modules_to_save``, kept in fp32); *NF4* = 4-bit storage by bitsandbytes. Follows "The LLM ARChitect"
(2024), section on training. ``model_tools`` re-exports the public names.
"""

import copy
import math
import re
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import nn

LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDING_LAYERS = ("embed_tokens", "lm_head")
_ADAPTER_PART = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|modules_to_save)\.")


# ----------------------------------------------------------------------------------------------- dtypes and 4 bits


def four_bit_layers(model):
    """Return {name: layer} of all NF4 layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def _unpacked(layer):
    """Return the weights (out, in) of an NF4 layer in fp32."""
    state = layer.weight.quant_state
    stored, state.dtype = state.dtype, torch.float32
    weight = bnb.functional.dequantize_4bit(layer.weight.data, state)
    state.dtype = stored
    return weight


def autocast_dtype(model, mixed_precision="auto"):
    """Return the dtype that a training casts its matrix products to; None: it casts nothing.

    mixed_precision: "auto" (bf16 or float16 where the base has 16 bits or fewer and is on a GPU), "bf16" (for an fp32
    base too, where the device computes in bf16: fp32 elsewhere), or "no".
    """
    dtypes = {parameter.dtype for parameter in model.parameters()}  # NF4 counts as bytes
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    if mixed_precision == "no":
        return None
    if mixed_precision == "auto" or torch.float16 in dtypes:
        if not on_gpu or dtypes == {torch.float32}:
            return None
        return torch.float16 if torch.float16 in dtypes else torch.bfloat16
    if on_gpu:
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # older PyTorch
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else None


def weight_dtype(layer):
    """Return the dtype of a linear layer's weights; of NF4 that to which it is unpacked."""
    return layer.weight.quant_state.dtype if isinstance(layer, bnb.nn.Linear4bit) else layer.weight.dtype


def frozen_weight(layer, dtype):
    """Return the weights (out, in) of a linear layer in a dtype; NF4 is unpacked to the dtype of its state first."""
    if isinstance(layer, bnb.nn.Linear4bit):
        bnb.nn.modules.fix_4bit_weight_quant_state_from_module(layer)
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
    return layer.weight.detach().to(dtype)


def _plain_linear(weight, bias, dtype):
    """Return a frozen ``nn.Linear`` around given weights (out, in)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return linear


def dequantise(model, dtype):
    """Replace the NF4 layers of a base model, in place, by plain ones and forget that it was quantised."""
    for name, layer in four_bit_layers(model).items():
        model.set_submodule(name, _plain_linear(_unpacked(layer), layer.bias, dtype))
    for owner, names in (
        (model, ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_4bit_serializable", "is_quantized")),
        (model.config, ("quantization_config",)),
    ):
        for name in names:
            if name in vars(owner):
                delattr(owner, name)


@contextmanager
def plain_weights(model):
    """Let a model, with or without adapter, compute with unpacked copies of its NF4 weights in this context.

    The copies have the dtype that the NF4 layers unpack to in every pass, so the answers are the same.
    """
    packed = four_bit_layers(model)
    try:
        for name, layer in packed.items():
            model.set_submodule(name, _plain_linear(_unpacked(layer), layer.bias, layer.weight.quant_state.dtype))
        yield model
    finally:
        for name, layer in packed.items():
            model.set_submodule(name, layer)


def _base_dtype(model):
    """Return the dtype that most of the base's floating-point tensors have (NF4 and adapters do not count)."""
    dtypes = Counter(
        p.dtype for n, p in model.named_parameters() if p.is_floating_point() and not _ADAPTER_PART.search(f".{n}")
    )
    return dtypes.most_common(1)[0][0]


def fix_dtypes(model, fix_weights=True, fix_quant_states=True):
    """Bring the base's floating-point weights and NF4 states, in place, to the base's usual dtype; adapters stay.

    Source: published ``fix_dtypes``; differs: the dtype is that of most tensors, not of the first, which may be an
    embedding trained in fp32.
    """
    dtype = _base_dtype(model)
    if fix_weights:
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not _ADAPTER_PART.search(f".{name}"):
                parameter.data = parameter.data.to(dtype)
    if fix_quant_states:
        for layer in four_bit_layers(model).values():
            layer.weight.quant_state.dtype = dtype
    return model


# ------------------------------------------------------------------------------------------------------------- LoRA


def adapter_settings(model):
    """Return lines on how a model's LoRA layers enter its answers: scaling, active adapters, switched off or not."""
    return [
        f"{name} {sorted(layer.scaling.items())} {layer.active_adapters} {layer.disable_adapters}"
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    ]


def is_peft_model(model):
    """Tell whether a model carries an adapter. Source: published ``is_peft_model``."""
    return hasattr(model, "peft_type")


def untie(model):
    """Give a model with tied embeddings, in place, a head of its own: the two are trained separately."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _cast_output(dtype, module, args, output):
    """Forward hook: hand the decoder its embeddings in the base's dtype."""
    return output.to(dtype)


def _cast_input(module, args):
    """Forward pre-hook: hand the head its input in the head's dtype."""
    return (args[0].to(module.weight.dtype), *args[1:])


def create_lora(  # noqa: PLR0913
    model,
    r,
    alpha,
    target_modules=LORA_LAYERS,
    train_embeddings=True,
    rank_stabilised=True,
    dropout=0.0,
    seed=42,
):
    """Put a trainable LoRA adapter on a model (changed in place; tied embeddings are untied if they are trained).

    Args:
        model: base model, quantised or not.
        r, alpha, rank_stabilised, dropout: of LoRA; rank-stabilised scales by alpha / sqrt(r) instead of alpha / r.
        target_modules: layers that get a LoRA; embed_tokens and lm_head among them are trained in full.
        train_embeddings: train embeddings and head in full; all trained weights are fp32.
        seed: decides the initial LoRA matrices; the caller's random state does not.

    Returns:
        PeftModel.

    Raises:
        ValueError: the model has an adapter already.

    Source: hyper-parameters of the published training scripts; embedding and head in full are what unsloth makes of
    ``embed_tokens`` and ``lm_head`` among the target modules.
    """
    if is_peft_model(model):
        raise ValueError("the model has an adapter already: merge it, or reset it with reset_lora")
    dtype = _base_dtype(model)
    in_full = [name for name in EMBEDDING_LAYERS if train_embeddings or name in target_modules]
    if in_full:
        untie(model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        target_modules=[name for name in target_modules if name not in EMBEDDING_LAYERS],
        modules_to_save=in_full or None,
        use_rslora=rank_stabilised,
        lora_dropout=dropout,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if dtype != torch.float32:
        for name, module in model.named_modules():
            if isinstance(module, ModulesToSaveWrapper) and name.endswith("embed_tokens"):
                module.register_forward_hook(partial(_cast_output, dtype))
            elif isinstance(module, ModulesToSaveWrapper):
                module.register_forward_pre_hook(_cast_input)
    reset_lora(model, seed)
    return model


@torch.no_grad()
def reset_lora(model, seed=42):
    """Bring the adapter of a PEFT model, in place, back to where ``create_lora(..., seed=seed)`` started it.

    LoRA matrices A are drawn anew (uniform within 1/sqrt(inputs), from a generator of their own), B are zero;
    embeddings and head are those of the base.
    """
    if not is_peft_model(model):
        raise ValueError("the model has no adapter to reset: call create_lora first")
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, matrix in module.lora_A.items():
                bound = 1 / math.sqrt(matrix.in_features)
                drawn = torch.empty(matrix.weight.shape).uniform_(-bound, bound, generator=generator)
                matrix.weight.data.copy_(drawn)
                module.lora_B[name].weight.data.zero_()
        elif isinstance(module, ModulesToSaveWrapper):
            for copy in module.modules_to_save.values():
                for trained, original in zip(copy.parameters(), module.original_module.parameters(), strict=True):
                    trained.data.copy_(original)
    model.zero_grad(set_to_none=True)


def merge_peft_into_base(model):
    """Add the adapter of a PEFT model into its base.

    An NF4 base is unpacked, and the sum kept in the base's usual dtype (bf16 or fp32). Embeddings and head trained in
    full replace those of the base, which is untied then.

    Returns:
        the base model without adapter; the PEFT model is used up.

    Source: published ``merge_peft_into_base``; differs: an NF4 base is not quantised again after the sum.
    """
    if not is_peft_model(model):
        raise ValueError("the model has no adapter to merge")
    training, dtype = model.training, _base_dtype(model)
    base = model.get_base_model()
    for name, layer in list(base.named_modules()):
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), bnb.nn.Linear4bit):
            quantised = layer.get_base_layer()
            weight = _unpacked(quantised)
            for adapter in layer.active_adapters:
                if adapter in layer.lora_variant:
                    raise ValueError(f"{name}: only plain LoRA can be merged into 4-bit weights")
                weight += layer.get_delta_weight(adapter).float()
            base.set_submodule(name, _plain_linear(weight, quantised.bias, dtype))
    base = model.merge_and_unload()
    dequantise(base, dtype)
    for parameter in base.parameters():
        parameter.data = parameter.data.to(dtype)
    return base.train(training)


def save_base(path, model):
    """Save the base of a PEFT model into a folder, as it is stored (NF4 stays NF4); the model keeps its adapter."""
    base, path = model.get_base_model(), Path(path)
    state = {name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor.contiguous()
             for name, tensor in base.state_dict().items() if not _ADAPTER_PART.search(f".{name}")}  # fmt: skip
    base.config.save_pretrained(path)  # a quantised model's own method would save the adapter's layers instead
    base.generation_config.save_pretrained(path)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def save_adapter(path, model, state):
    """Save an adapter that is not the one in a PEFT model as PEFT saves one.

    Args:
        path: a folder. model: a PEFT model whose adapter has the same configuration. state: {name of a tensor in a PEFT
            adapter: tensor on the CPU}.
    """
    config = copy.copy(model.active_peft_config)
    config.inference_mode = True
    config.save_pretrained(path)
    save_file(state, Path(path) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def set_peft_weights(model, state_dict):
    """Set the weights of a PEFT model's adapter.

    Args:
        state_dict: {name: tensor}, as ``get_and_fix_peft_weights`` returns it.

    Raises:
        KeyError: weights that are missing, left over, or of another shape; names them.

    Source: published ``set_peft_weights``; differs: a missing weight is an error too.
    """
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    problems = {
        "missing": sorted(set(expected) - set(state_dict)),
        "unexpected": sorted(set(state_dict) - set(expected)),
        "of another shape": [
            f"{name} {tuple(state_dict[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in sorted(set(expected) & set(state_dict))
            if state_dict[name].shape != expected[name].shape
        ],
    }
    report = [f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in problems.items() if names]
    if report:
        raise KeyError(f"the adapter does not fit the model (same r, layers and vocabulary?): {'; '.join(report)}")
    set_peft_model_state_dict(model, state_dict)
