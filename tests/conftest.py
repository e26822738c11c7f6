"""Fixtures that several test modules share: tiny random models, a tokenizer trained on the fly, ARC data."""

import gc
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from arc_downloader import download_arc_data
from arc_loader import ArcDataset

SPECIAL_TOKENS = ["<|begin_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>", "<|reserved|>"]
TRAINING_TEXT = ["the cat sat on the mat and the hat 2024", "IN 12 34\nOUT 56 78\n", "ABC abc +/-= !?.:,;*"] * 20


def make_bpe_tokenizer():
    """Train a small byte-level BPE tokenizer, built like Llama 3's: special tokens last, a start token by template."""
    core = Tokenizer(models.BPE(ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, min_frequency=2, show_progress=False)
    core.train_from_iterator(TRAINING_TEXT, trainer)
    core.add_special_tokens(SPECIAL_TOKENS)
    bos = SPECIAL_TOKENS[0]
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))]
    )
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[1],
        eos_token=SPECIAL_TOKENS[2],
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def make_tiny_llama(tokenizer, tied=False, seed=0, hidden_size=64):
    """Make a random two-layer Llama in fp32 for ``tokenizer``; its weights depend on ``seed`` alone."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,  # large enough that logits differ clearly
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of a shrunk tiny model: untied, tied, and the untied one stored as NF4."""
    import model_tools  # not before the tests' threads are set
    from small_models import small_pair

    root = tmp_path_factory.mktemp("models")
    for name in ("untied", "tied"):
        model_tools.save_model_and_tokenizer(root / name, *small_pair(tied=name == "tied"))
    model_tools.save_model_and_tokenizer(root / "nf4", *model_tools.load_model(root / "untied", bits=4, device="cpu"))
    return root


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Keep torch on one thread: tiny models are slower with more."""
    torch.set_num_threads(1)


@pytest.fixture
def bpe_tokenizer():
    """A fresh byte-level BPE tokenizer of about 300 tokens."""
    return make_bpe_tokenizer()


@pytest.fixture
def tiny_llama(bpe_tokenizer):
    """A pair (model, tokenizer): a random untied two-layer Llama and its tokenizer."""
    return make_tiny_llama(bpe_tokenizer), bpe_tokenizer


@pytest.fixture
def tiny_tied_llama(bpe_tokenizer):
    """As ``tiny_llama``, with tied input and output embeddings."""
    return make_tiny_llama(bpe_tokenizer, tied=True), bpe_tokenizer


@pytest.fixture(scope='session')
def arc_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('arc')
    download_arc_data(path)
    return path


@pytest.fixture(scope='session')
def evaluation(arc_folder):
    tasks = ArcDataset.load_from_json(arc_folder / 'arc-agi_evaluation_challenges.json')
    return tasks.load_solutions(arc_folder / 'arc-agi_evaluation_solutions.json')


@pytest.fixture(scope='session')
def rearc_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('re_arc')
    names = [f'aaaa000{task}' for task in range(3)]
    (path / 'tasks').mkdir()
    (path / 'metadata.json').write_text(json.dumps({name: {} for name in names}))
    for task, name in enumerate(names):
        examples = [{'input': [[task, j // 10, j % 10]], 'output': [[j % 10, j // 10]]} for j in range(30)]
        (path / 'tasks' / f'{name}.json').write_text(json.dumps(examples))
    return path


@pytest.fixture
def no_garbage_collection():
    """Objects that refer to each other stay, unless the code itself collects them."""
    gc.disable()
    yield
    gc.enable()
