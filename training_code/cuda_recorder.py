"""Record what runs on a GPU as CUDA graphs, which repeat it without Python: for training passes and for the search.

Source: CUDA graphs as of the PyTorch manual: warm-ups and recordings on a stream beside the current one, with memory in
a pool of their own.
"""

import contextlib
import functools

import torch


@functools.cache
def _side_stream(device):
    """Return the stream for recordings: one for all, since PyTorch keeps memory of every stream that multiplies."""
    return torch.cuda.Stream(device)


class CudaRecorder:
    """Records what functions launch on a GPU. All recordings share their memory: a replay overwrites other results."""

    def __init__(self, device):
        self.device, self.stream, self.pool = device, _side_stream(device), torch.cuda.graph_pool_handle()

    def wait(self):
        """Wait until the GPU has done all."""
        torch.cuda.synchronize(self.device)

    def release(self):
        """Give back the memory of recordings and warm-ups that are not used any more."""
        torch.cuda.empty_cache()

    def warm_up(self, function):
        """Run a function where recordings are made, so that everything it needs once is there.

        Returns its result, whose memory is that stream's: clone what is to stay.
        """
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                return function()
        finally:
            current.wait_stream(self.stream)

    def record(self, function):
        """Record a function without running it.

        Returns (the recording, which has a method ``replay``; the result, which every replay makes anew).

        Raises RuntimeError if the function cannot be recorded, torch.OutOfMemoryError where memory is short.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with (torch.cuda.stream(torch.cuda.current_stream(self.device)),  # brings the stream back after errors too
                  torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")):  # fmt: skip
                result = function()
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError):
                self._end_recording()
            raise
        return graph, result

    def _end_recording(self):
        """Let PyTorch know that a recording has ended: up to 2.12 it forgets that where CUDA refuses one."""
        with contextlib.suppress(RuntimeError):  # it is known
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
