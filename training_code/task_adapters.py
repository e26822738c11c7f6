"""The adapters of an evaluation with `--ttt per-task`: trained for a group of tasks at once, used side by side.

A group is as many neighbouring tasks as fill a forward pass and fit in memory (see `stack_training.group_is_full`), on
a CPU one. Its adapters are saved when they are trained, in `finetuned_model_per_task/<task>/`, where a killed run finds
them again; to the search they come from memory, those of several groups at once.
"""

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from peft import get_peft_model_state_dict, load_peft_weights
from tqdm import tqdm

from adapter_rows import AdapterRows, most_adapters
from adapter_stack import AdapterStack
from adapter_tools import reset_lora, save_adapter, set_peft_weights
from evaluation_results import as_made
from packing import can_pack
from run_tools import folder_written_whole, memory_advice
from stack_training import group_is_full, make_member, measure_room, train_stack
from trainers import Collator
from training_tools import tell_shortened, tokens_of_texts
from ttt_tools import (IDENTITY_FILE, adapter_folder, only_tasks, prepare_training, saved_notes, set_others_aside,
                       training_seed)
from vocabulary_tools import save_tokenizer

OPTION_PREFIX = "--per-task."


def can_train_together(run, model):
    """Tell whether the tasks of a run can be trained as a stack; else they are trained one by one by the Trainer."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return (run.training.packing and torch.float16 not in dtypes
            and can_pack(model, run.fmt_opts(training=True)["max_tokens"]))


class TaskAdapters:
    """Trains and hands out the adapters of tasks."""

    def __init__(self, run, model_tok, tasks, tokens):
        """tokens: {task: a number that none of its training texts exceeds}."""
        self.run, self.tasks, self.tokens = run, tasks, tokens
        self.model, self.tokenizer = model_tok
        self.settings = replace(run.training, seed=training_seed(run))
        self._most = max(1, most_adapters(self.model, run.worker.count))
        self.room = None  # measured with the first group
        self._saver, self._saving = ThreadPoolExecutor(max_workers=1), []

    @property
    def side_by_side_at_most(self):
        """Return how many tasks are worth searching together: one where that many are worth training together."""
        return 1 if self.room is None or self.room.free == math.inf else self._most

    def groups(self, queue):
        """Yield lists of tasks to train together, from a queue of tasks similar in length side by side.

        An empty list stands for none now: one that was yielded before must be finished first.
        """
        group = []
        for name in queue:
            if group and (name is None or self._is_full(group, name)):
                yield group
                group = []
            if name is None:
                yield []
            else:
                group.append(name)
        if group:
            yield group

    def _is_full(self, group, name):
        per_step = self.settings.batch_size * self.settings.gradient_accumulation
        tokens = [per_step * self.tokens[task] for task in group]
        return group_is_full(tokens, per_step * self.tokens[name], self._room(name))

    def _room(self, name):
        if self.room is None:
            texts, _ = prepare_training(self.run, only_tasks(self.tasks, [name]), self.tokenizer)
            member = self._member(texts)
            if member is None:
                return None
            self.room = measure_room(self.model, member, max(self.tokens.values()), self.settings.mixed_precision)
        return self.room

    def _member(self, texts):
        """Return the `Member` of a task with these texts, None without any."""
        if not texts:
            return None
        fmt_opts = self.run.fmt_opts(self.tokenizer, training=True)
        collate = Collator(self.tokenizer, fmt_opts, self.settings.mask_first_n_examples, position_ids=None)
        return make_member(tokens_of_texts(self.tokenizer, texts, fmt_opts.get("max_tokens")), collate, self.settings)

    def train(self, names, seconds):
        """Train the adapters of a group that are not saved yet.

        seconds: about the most that it may take; None: any number.
        Returns {task: (adapter as {name: tensor} in main memory, what its training took)}; (None, None) for a task that
        stays untrained: not one demonstration pair fits, or no second is left.
        """
        self.wait_for_saving(only_done=True)  # a full disk ends the run here
        results, members, identities = dict.fromkeys(names, (None, None)), {}, {}
        for name in names:
            texts, identities[name] = prepare_training(self.run, only_tasks(self.tasks, [name]), self.tokenizer)
            folder = adapter_folder(self.run, name)
            set_others_aside([folder], identities[name])
            saved = saved_notes(folder)
            if saved is not None:
                tqdm.write(f"adapter loaded from {folder}")
                results[name] = load_peft_weights(str(folder), device="cpu"), saved["stats"]
            elif texts:
                members[name] = self._member(texts)
            else:
                tqdm.write(f"{name}: no demonstration pair fits, the adapter stays untrained")
        if not members or (seconds is not None and seconds <= 0):
            return results
        trained = self._train(members, self._room(next(iter(members))), seconds)
        for name, (state, stats) in trained.items():
            notes = {"identity": as_made(identities[name], stats), "stats": stats}
            self._saving.append(self._saver.submit(self._save, name, state, notes, members[name]))
        return results | trained

    def wait_for_saving(self, only_done=False):
        """Wait until all that is trained is saved, which goes on beside the training of the next group.

        only_done: do not wait, look at what is done.

        Raises:
            OSError: an adapter could not be saved.
        """
        while self._saving and (not only_done or self._saving[0].done()):
            self._saving.pop(0).result()

    def close(self):
        """Save what is trained, but for what has not begun when the time is up; say what could not be saved."""
        left = self.run.clock.left()
        self._saver.shutdown(cancel_futures=left is not None and left <= 0)
        for error in filter(None, (saved.exception() for saved in self._saving if not saved.cancelled())):
            tqdm.write(f"an adapter could not be saved: {error}")
        self._saving.clear()

    def _train(self, members, room, seconds):
        """Train a stack; return {task: (adapter, what its training took)} of the tasks that had a step."""
        begin = time.perf_counter()
        reset_lora(self.model, self.settings.seed)
        planned = {name: len(member.steps) for name, member in members.items()}
        advice = f"lower --tasks-at-once (tasks trained together), {OPTION_PREFIX}lora-rank or --max-tokens"
        with memory_advice(f"training the adapters of {len(members)} tasks", advice):
            stack = AdapterStack(self.model, len(members))
            totals = train_stack(stack, list(members.values()), self.settings, room, seconds)
        peak = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if stack.weights.is_cuda else {}
        spent, results = time.perf_counter() - begin, {}
        for (name, member), state in zip(members.items(), stack.adapters(), strict=True):
            if not member.losses:
                continue
            counts = member.counts()
            stats = counts | {"seconds": spent * counts["tokens"] / totals["tokens"], "steps": len(member.losses),
                              "loss": member.losses[-1], "tokens_per_second": totals["tokens_per_second"],
                              "trained_together": len(members), "losses": member.losses} | peak  # fmt: skip
            if len(member.losses) < planned[name]:
                stats["steps_planned"] = planned[name]
                tell_shortened(stats)
            results[name] = state, stats
        del stack
        if peak:
            torch.cuda.empty_cache()  # the search wants the memory
        return results

    def _save(self, name, state, notes, member):
        folder = adapter_folder(self.run, name)
        with folder_written_whole(folder) as partial:
            save_adapter(partial, self.model, state)
            save_tokenizer(partial, self.tokenizer)
            for file, values in (("training_loss.json", member.history()), (IDENTITY_FILE, notes)):
                (partial / file).write_text(json.dumps(values))  # of its own: the folder counts when it is whole

    def side_by_side(self, states):
        """Return the `AdapterRows` of {task: adapter as `train` returns it, None: an untrained one}."""
        self.use(None)
        untrained = {name: tensor.detach().cpu() for name, tensor in  # beside the others
                     get_peft_model_state_dict(self.model, save_embedding_layers=False).items()}  # fmt: skip
        return AdapterRows(self.model, {name: state or untrained for name, state in states.items()})

    def use(self, state):
        """Give the model an adapter as `train` returns it; None: an untrained one."""
        if state is None:
            reset_lora(self.model, self.settings.seed)
        else:
            set_peft_weights(self.model, state)
