"""The Trainer behind fine-tuning and test-time training: transformers' own, with what both need beside it.

That is: batches that are packed (`packing`) or padded, with everything masked but the replies; two learning rates
(adapters, and the fully trained embeddings and output layer); counts of what reaches the model; under torchrun each
worker's share of the texts; and packed passes, whose gradients are added up by `training_passes`.
"""

import functools
import math

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer

from adapter_tools import EMBEDDING_LAYERS
from model_tools import InputMaskingDataCollator
from packing import NO_LABEL, pack, to_device
from torchrun_tools import average_over_workers, copy_of_first, this_worker
from training_passes import memory_share, memory_taken


class Collator:
    """Make a batch with `InputMaskingDataCollator`, on the templates of the prompt format; packed or padded."""

    def __init__(self, tokenizer, fmt_opts, mask_first_n_examples, position_ids):
        """position_ids: of `packing.position_ids_of`, to pack; None: to pad."""
        self.collate = InputMaskingDataCollator(
            instruction_template=fmt_opts["query_beg"], response_template=fmt_opts["reply_beg"], tokenizer=tokenizer,
            mlm=False, mask_first_n_examples=mask_first_n_examples)
        self.position_ids = position_ids
        filler = torch.full((1, 2), tokenizer.eos_token_id)
        self.filler = {"input_ids": filler, "attention_mask": torch.ones_like(filler),
                       "labels": torch.full_like(filler, NO_LABEL)}

    def __call__(self, features):
        # without a text this worker of torchrun takes part in the step all the same: nothing to learn
        batch = self.collate([{"input_ids": feature["input_ids"]} for feature in features]) if features else self.filler
        if self.position_ids is None:
            return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}  # (B, T) each
        rows = zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True)
        packed = pack([(ids[mask].numpy(), labels[mask].numpy()) for ids, mask, labels in rows], self.position_ids)
        return packed | {"learned": int((packed["labels"] != NO_LABEL).sum())}  # counted before it is on a GPU


def batches_of_worker(settings, n_workers):
    """Return how each of so many workers does its share of a step: (texts in a forward pass, forward passes)."""
    share = math.ceil(settings.batch_size * settings.gradient_accumulation / n_workers)
    n_passes = math.ceil(share / settings.batch_size)
    return math.ceil(share / n_passes), n_passes


class SharedBatches(Sampler):
    """The batches of one of several workers: its share of the texts that every step has in a single process.

    The texts of a step, sorted by length, are dealt out one by one. Each worker has equally many batches; some are
    empty where texts run out, so that none comes twice, or where others hold more texts than their number asks for.
    """

    def __init__(self, lengths, settings, worker, steps_done, most_tokens=None):  # noqa: PLR0913
        """Make the batches.

        lengths: of all texts, in tokens. steps_done: a function that returns how many steps are behind. most_tokens: of
        a batch, which takes as many texts; None: as many as the settings say.
        """
        self.lengths, self.worker, self.steps_done, self.most_tokens = lengths, worker, steps_done, most_tokens
        self.step_size = settings.batch_size * settings.gradient_accumulation
        self.batch_size, self.n_passes = batches_of_worker(settings, worker.count)
        self.n_steps = math.ceil(len(lengths) / self.step_size)
        self.order = SeedableRandomSampler(lengths, data_seed=settings.seed)  # the order of a single process

    def __len__(self):
        return self.n_steps * self.n_passes

    def __iter__(self):
        self.order.set_epoch(self.steps_done() // self.n_steps)
        order = list(self.order)
        for start in range(0, len(order), self.step_size):
            texts = sorted(order[start : start + self.step_size], key=self.lengths.__getitem__)
            batches = self._cut(texts[self.worker.rank :: self.worker.count])
            yield from batches + [[]] * (self.n_passes - len(batches))

    def _cut(self, texts):
        """Cut a worker's share of a step into its batches, at most `n_passes`."""
        if self.most_tokens is None:
            return [texts[i : i + self.batch_size] for i in range(0, len(texts), self.batch_size)]
        batches, tokens = [], math.inf
        for text in texts:
            tokens += self.lengths[text]
            if tokens > self.most_tokens:
                batches.append([])
                tokens = self.lengths[text]
            batches[-1].append(text)
        return batches


class TwoRates:
    """What a Trainer gets: a second learning rate for embeddings and output layer, counts of what reaches the model."""

    def __init__(self, *args, embedding_learning_rate, seen, losses, share_batches,  # noqa: PLR0913
                 gradients=None, record=None, **kwargs):
        """Make a trainer.

        seen: a dict of counts, added to in place. losses: list, to which the loss of every step, a tensor, is appended:
        nothing waits for it. share_batches: makes this worker's `SharedBatches`. gradients:
        `training_passes.Gradients` to which packed passes add up; None: the Trainer runs its own passes. record:
        function (run one pass) -> `training_passes.RecordedPasses`; None: as they are.
        """
        super().__init__(*args, **kwargs)
        self.embedding_learning_rate, self.seen, self.share_batches = embedding_learning_rate, seen, share_batches
        self.losses, self.step_loss = losses, 0.0
        self.gradients, self.recorded = gradients, record(self._pass) if record else None
        self.recomputation = None  # where packed passes do not all fit
        if gradients is not None:  # without DistributedDataParallel, whose buckets nobody would use
            copy_of_first(gradients.parameters)
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = functools.partial(prepare, evaluation_mode=True)

    def get_train_dataloader(self):
        """Return what loads the Trainer's batches; it makes its own ones alone and without packed passes."""
        if this_worker().count == 1 and self.gradients is None:
            return super().get_train_dataloader()
        batches = self.share_batches(steps_done=lambda: self.state.global_step)
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator,
                          pin_memory=self.args.dataloader_pin_memory)

    def create_optimizer(self, model=None):
        """Create the optimiser with one parameter group per learning rate."""
        if self.optimizer is None:
            adapters, embeddings = split_parameters(self.model if model is None else model)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(
                [{"params": list(adapters.values())},
                 {"params": list(embeddings.values()), "lr": self.embedding_learning_rate}],
                weight_decay=self.args.weight_decay, **options)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the batches of a step and what they have to learn, of which a lone worker knows without its GPU."""
        if self.gradients is not None and this_worker().count == 1:
            device = torch.device("cpu")
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Run one pass; the gradients of a step are added up, over all workers in its last pass."""
        if self.gradients is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self._packed_step(inputs, num_items_in_batch)
        self.step_loss = self.step_loss + loss
        if self.accelerator.sync_gradients:
            self.losses.append(self.step_loss)
            self.step_loss = 0.0
        return loss

    def memory_of_pass(self, batches, dtype):
        """Run packed passes in autocast to a dtype (None: without); return the bytes that the last one took.

        Nothing of them stays.
        """
        def run(batch):
            inputs = {name: value for name, value in batch.items() if name != "learned"}
            inputs = to_device(inputs, self.args.device) | {"n_labels": torch.ones((), device=self.args.device)}
            with torch.autocast(self.args.device.type, dtype, enabled=dtype is not None):
                self._pass(inputs)

        self.gradients.start_step()
        for batch in batches:
            taken = memory_taken(functools.partial(run, batch))
        self.gradients.drop()
        return taken

    def _packed_step(self, inputs, n_labels):
        learned, batch = inputs["learned"], to_device(self._counted(inputs), self.args.device)
        if n_labels.device == self.args.device:
            n_labels = n_labels.float()
        else:
            n_labels = torch.full((), float(n_labels), device=self.args.device)  # made there
        self.gradients.start_step()
        run = self._pass if self.recorded is None else self.recorded.run
        loss = run(batch | {"n_labels": n_labels}) if learned else torch.zeros_like(n_labels)
        if self.accelerator.sync_gradients:
            average_over_workers(self.gradients.flat)
        return loss

    def _clip_grad_norm(self, model):
        """Clip the gradients of a step; return their norm before that."""
        if self.gradients is None:
            return super()._clip_grad_norm(model)
        return self.gradients.clip(self.args.max_grad_norm)

    def floating_point_ops(self, inputs):
        """Return 0, nobody asks: the Trainer would count the model's weights in every pass."""
        return 0

    def _pass(self, batch):
        """Run a packed pass forward and backward; return its part of the step's loss."""
        n_labels = batch["n_labels"]
        if self.recomputation is not None:
            self.recomputation.prepare(batch["input_ids"].numel(), memory_share(self.recorded))
        inputs = {name: value for name, value in batch.items() if name != "n_labels"}
        loss = Trainer.compute_loss(self, self.model, inputs, num_items_in_batch=n_labels)
        self.gradients.add(loss)
        return loss.detach()

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Compute the loss of one batch as the Trainer does and count its texts and tokens."""
        return Trainer.compute_loss(self, model, self._counted(inputs), *args, **kwargs)  # trl's needs the logits too

    def _counted(self, inputs):
        """Count a batch; return what the model gets of it."""
        packed = "cu_seq_lens_q" in inputs
        learned = inputs["learned"] if packed else int((inputs["labels"][:, 1:] != NO_LABEL).sum())
        if learned:  # in every text something is
            self.seen["texts"] += len(inputs["cu_seq_lens_q"]) - 1 if packed else len(inputs["input_ids"])
            self.seen["tokens"] += inputs["input_ids"].numel() if packed else int(inputs["attention_mask"].sum())
            self.seen["loss_tokens"] += learned
        return {name: value for name, value in inputs.items() if name != "learned"}


class TwoRateTrainer(TwoRates, Trainer):
    """The Trainer of transformers."""


def split_parameters(model):
    """Split the trainable parameters into adapters and fully trained embeddings.

    Returns two dicts {name: parameter}: the LoRA matrices, and the weights of `embed_tokens` and `lm_head`.

    Raises ValueError if nothing is trainable.
    """
    adapters, embeddings = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_embedding = "lora_" not in name and any(part in EMBEDDING_LAYERS for part in name.split("."))
            (embeddings if is_embedding else adapters)[name] = parameter
    if not adapters and not embeddings:
        raise ValueError("the model has no trainable parameter: add an adapter with model_tools.create_lora first")
    return adapters, embeddings
