"""One forward pass of the engine: what it yields, and how that comes back from the device."""

import itertools

import numpy as np
import torch

from plain_search import refuse_nan

_SMALL_VOCABULARY = 512  # up to here all log-probabilities are fetched from the device


class Pass:
    """A forward pass under way: its chains and the log-probabilities that it will yield."""

    def __init__(self, works, counts, logp):
        """Take chains, the number of rows with logits of each, and log-probabilities (rows, V) on the device."""
        self.works, self.starts = works, counts.cumsum() - counts
        self.bounds = np.repeat(np.array([work.bound for work in works], np.float32), counts)
        self.greedy = bool(np.isinf(self.bounds).any())
        wanted = np.array([len(work.targets) for work in works])
        self.rows = np.arange(wanted.sum()) + np.repeat(self.starts - wanted.cumsum() + wanted, wanted)
        self.targets = np.fromiter(itertools.chain.from_iterable(work.targets for work in works), np.int64)
        if logp.shape[1] > _SMALL_VOCABULARY:  # too much to fetch: what matters is picked out there, and waited for
            self.found = self._pick(logp)
        else:
            self.found, self.logp = None, logp.to("cpu", non_blocking=True)
        self.event = torch.cuda.Event() if logp.is_cuda else None
        if self.event is not None:
            self.event.record()

    def _limits(self, logp):
        """Return the least log-probability of a hit in each row, (rows,): where all would be hits, the highest."""
        limits = -torch.from_numpy(self.bounds).to(logp.device)
        return torch.where(limits.isinf(), logp.amax(1), limits) if self.greedy else limits

    def _pick(self, logp):
        rows, targets = torch.from_numpy(np.stack([self.rows, self.targets])).to(logp.device)
        hits = (logp >= self._limits(logp)[:, None]).nonzero()
        refuse_nan(logp[:, 0].isnan().any().item())
        hit_logp, target_logp = logp[hits[:, 0], hits[:, 1]], logp[rows, targets]
        hit_rows, hit_tokens = hits.cpu().numpy().T
        return hit_rows, hit_tokens, hit_logp.double().cpu().numpy(), target_logp.double().cpu().numpy()

    def results(self):
        """Wait for the pass; return (rows, tokens, log-probabilities of what may be within the threshold, by rows;
        log-probabilities of the chains' targets). Of a chain without a threshold, the most probable tokens alone.

        Raises:
            FloatingPointError: when the model yields NaN.
        """
        if self.event is not None:
            self.event.synchronize()
        if self.found is not None:
            return self.found
        logp = self.logp.numpy()
        refuse_nan(np.isnan(logp[:, 0]).any())
        rows, tokens = np.nonzero(logp >= self._limits(self.logp).numpy()[:, None])
        return rows, tokens, logp[rows, tokens].astype(np.float64), logp[self.rows, self.targets].astype(np.float64)
