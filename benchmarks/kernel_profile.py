"""Where a device's time goes: seconds by kind of kernel, from PyTorch's profiler."""

import time

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# the first kind of which a word occurs in a kernel's (on a CPU: an operation's) name
KINDS = {
    "attention to trees": ("_tree_kernel",),
    "attention, PyTorch's": ("flash", "fmha", "scaled_dot_product", "efficient_attention"),
    "4-bit weights": ("dequantize", "4bit", "nf4"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "splitk", "aten::mm", "aten::bmm", "aten::addmm"),
    "copies": ("memcpy", "memset", "copy", "cat", "index", "gather", "scatter", "arange", "fill"),
    "reductions": ("reduce", "softmax", "aten::mean", "aten::sum"),
    "elementwise": ("elementwise", "aten::mul", "aten::silu", "aten::add", "aten::neg", "aten::pow", "aten::rsqrt",
                    "aten::cos", "aten::sin"),
}  # fmt: skip
OTHER = "other"


def kind_of(name):
    """Return the kind of a kernel."""
    name = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), OTHER)


def profile_kernels(function, device):
    """Run a function; return {"seconds": as the clock has it, under the profiler, "kinds": {kind: seconds},
    "largest": the ten kernels that took most: [name, seconds]}.

    device: "cuda" = the GPU's kernels, "cpu" = PyTorch's operations.
    """
    on_gpu = device == "cuda"
    begin = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        function()
    seconds = time.perf_counter() - begin
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    spent = [(event.key, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6)
             for event in profiler.key_averages() if event.device_type == wanted]  # fmt: skip
    kinds = {}
    for name, took in spent:
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + took
    largest = sorted(spent, key=lambda one: -one[1])[:10]
    return {"seconds": seconds, "kinds": kinds, "largest": [[name[:120], took] for name, took in largest]}
