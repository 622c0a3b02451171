"""Students made of a teacher: the kept blocks' weights, a config that says so, and caches that still work."""

from __future__ import annotations

import collections
import copy
import functools

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from lightning_compress.distillation.pairing import blocks_of, pair_by_depth
from lightning_compress.distillation.students import keep_layers, kept_places, narrow
from lightning_compress.errors import CompressError, NothingToCompress

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
TINY = {**SIZES, "num_hidden_layers": 6}
SEQ2SEQ = {
    "vocab_size": 32, "d_model": 16, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 16,
}  # fmt: skip
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 4, "num_heads": 2}
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 6, "n_head": 2, "n_positions": 32}
MAKERS = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**TINY)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=1, **TINY)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(num_key_value_heads=1, **TINY)),
    # Every second layer looks only at its neighbours, which its config lists layer by layer.
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(num_key_value_heads=1, head_dim=8, sliding_window=2, pad_token_id=0, **TINY)
    ),
    "distilbert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(vocab_size=32, dim=16, n_layers=6, n_heads=2, hidden_dim=16)
    ),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(decoder_start_token_id=0, **T5)),
}
LISTS = {"bart": "model.decoder.layers", "t5": "decoder.block"}
IDS = torch.arange(1, 9)[None]


GENERATORS = ["bart", "gemma2", "gpt2", "llama", "qwen2", "t5"]


@functools.cache
def teacher(kind):
    torch.manual_seed(0)
    return MAKERS[kind]().eval()


@pytest.fixture(autouse=True)
def quiet():
    hf.utils.logging.disable_progress_bar()
    yield
    hf.utils.logging.enable_progress_bar()


def inputs(model):
    return {"input_ids": IDS, **({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})}


def answer(model):
    with torch.no_grad():
        return model(**inputs(model), use_cache=False)[0] if hasattr(model, "lm_head") else model(**inputs(model))[0]


def by_blocks(model, name, kept):
    """The teacher's own answer when the other blocks pass on what they get."""
    patched = copy.deepcopy(model)
    blocks = patched.get_submodule(name)
    for place, block in enumerate(blocks):
        if place not in kept:
            block.forward = lambda hidden, *rest, **named: hidden
    return answer(patched)


@pytest.mark.parametrize("layers", [[0, 3], "first and last"])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_student_is_its_teacher_with_the_other_blocks_passed_over(kind, layers):
    model = teacher(kind)
    names = blocks_of(model)
    before = copy.deepcopy(model.state_dict())
    student = keep_layers(model, layers)
    kept = kept_places(names, layers)
    holder = names[0].rpartition(".")[0]
    assert holder == LISTS.get(kind, holder)
    assert [type(block) for block in student.get_submodule(holder)] == [type(model.get_submodule(names[0]))] * 2
    for place, old in enumerate(kept):
        own, teachers = (m.get_submodule(holder)[p].state_dict() for m, p in ((student, place), (model, old)))
        assert own.keys() == teachers.keys()
        assert all(torch.equal(own[key], teachers[key]) and own[key] is not teachers[key] for key in own)
    if kind != "t5":  # whose blocks hand on a position bias beside what they compute
        torch.testing.assert_close(answer(student), by_blocks(model, holder, kept))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(model.get_submodule(holder)) == len(names)


@pytest.mark.parametrize("kind", MAKERS)
def test_it_saves_and_loads_as_the_same_model(kind, tmp_path):
    student = keep_layers(teacher(kind), [0, 3])
    student.save_pretrained(tmp_path)
    loaded, found = type(student).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert all(torch.equal(value, student.state_dict()[key]) for key, value in loaded.state_dict().items())
    torch.testing.assert_close(answer(loaded.eval()), answer(student))
    assert loaded.config.to_dict() == hf.AutoConfig.from_pretrained(tmp_path).to_dict()


@pytest.mark.parametrize("layers", [[0, 3], [0, 1, -1]])
@pytest.mark.parametrize("kind", GENERATORS)
def test_generation_is_the_same_with_and_without_a_cache(kind, layers):
    student = keep_layers(teacher(kind), layers)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens = [student.generate(IDS, use_cache=cache, **options) for cache in (False, True)]
    assert torch.equal(*tokens)
    with torch.no_grad():
        cached = student(**inputs(student), use_cache=True)
    cache = getattr(cached.past_key_values, "self_attention_cache", cached.past_key_values)
    assert [layer.get_seq_length() for layer in cache.layers] == [8] * len(layers)


def test_encoders_and_decoders_shrink_alone():
    bart, t5 = MAKERS["bart"](), MAKERS["t5"]()
    config = keep_layers(bart, 1).config
    assert (config.encoder_layers, config.decoder_layers) == (4, 1)
    config = keep_layers(bart, 3, "model.encoder.layers").config
    assert (config.encoder_layers, config.decoder_layers) == (3, 4)
    student = keep_layers(t5, "first and last")
    assert (student.config.num_layers, student.config.num_decoder_layers) == (4, 2)
    assert student.decoder.config.num_layers == 2
    student = keep_layers(t5, [0], "encoder.block")
    assert (student.config.num_layers, student.config.num_decoder_layers) == (1, 4)
    assert t5.config.num_layers == t5.decoder.config.num_layers == 4


def test_layer_lists_and_places_follow_the_kept_blocks():
    student = keep_layers(MAKERS["gemma2"](), [0, 3, 5])
    assert student.config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1, 2]
    assert [layer.self_attn.sliding_window for layer in student.model.layers] == [2, None, None]


def test_a_config_inside_a_config_is_the_one_to_correct():
    vision = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 8}
    text = hf.LlamaConfig(num_key_value_heads=1, **TINY)
    config = hf.LlavaConfig(text_config=text, vision_config=hf.CLIPVisionConfig(image_size=28, patch_size=14, **vision))
    student = keep_layers(hf.LlavaForConditionalGeneration(config), 3)
    assert (student.config.text_config.num_hidden_layers, student.config.vision_config.num_hidden_layers) == (3, 2)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (lambda: MAKERS["t5"](), r"relative_attention_bias.weight' of block 0 is \(32, 2\), and nothing in"),
        (
            lambda: hf.GPT2LMHeadModel(hf.GPT2Config(scale_attn_by_inverse_layer_idx=True, **GPT2)),
            r"'attn.scaling' of block 0 is 0.35\d+, and 0.11\d+ in the student",
        ),
    ],
    ids=["first block's bias", "scale by place"],
)
def test_what_depends_on_its_place_cannot_move(model, what):
    with pytest.raises(ValueError, match=rf"cannot be kept: what from_pretrained builds .*{what}.*the first one too"):
        keep_layers(model(), 2)


def test_a_config_that_cannot_say_it_is_refused():
    swin = hf.SwinConfig(embed_dim=8, depths=[1, 3], num_heads=[1, 1], image_size=32, window_size=4)
    with pytest.raises(ValueError, match=r"'encoder.layers.1.blocks' has 3 blocks, and 1 in the student"):
        keep_layers(hf.SwinModel(swin), 1, "encoder.layers.1.blocks")


def test_nothing_random_is_drawn():
    torch.manual_seed(5)
    model = MAKERS["llama"]()
    state = torch.get_rng_state()
    keep_layers(model, 2)
    assert torch.equal(torch.get_rng_state(), state)


# Modules of no library


class Deep(nn.Module):
    def __init__(self, count=5, kind=nn.ModuleList) -> None:
        super().__init__()
        blocks = [nn.Linear(3, 3) for _ in range(count)]
        named = collections.OrderedDict((f"block{i}", block) for i, block in enumerate(blocks))
        self.num_layers = count
        self.blocks = {nn.ModuleList: lambda: nn.ModuleList(blocks)}.get(kind, lambda: kind(named))()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        for block in self.blocks.values() if isinstance(self.blocks, nn.ModuleDict) else self.blocks:
            x = block(x).tanh()
        return self.head(x)


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential, nn.ModuleDict])
def test_any_list_of_blocks_can_be_cut(kind):
    teacher = Deep(5, kind)
    names = [f"blocks.{name}" for name, _ in teacher.blocks.named_children()]
    student = keep_layers(teacher, [names[1], 4], "blocks")
    assert [name for name, _ in student.blocks.named_children()] == (
        ["0", "1"] if kind is nn.ModuleList else ["block1", "block4"]
    )
    x = torch.randn(2, 3)
    hidden = teacher.get_submodule(names[4])(teacher.get_submodule(names[1])(x).tanh()).tanh()
    assert torch.equal(student(x), teacher.head(hidden))
    assert (student.num_layers, teacher.num_layers) == (2, 5)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in student.parameters())


def test_a_model_that_is_its_own_list_and_ties_within_it():
    teacher = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    teacher[3].weight = teacher[0].weight
    student = keep_layers(teacher, "first and last")
    assert len(student) == 2
    assert student[0].weight is student[1].weight is not teacher[0].weight


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        ("every second", 12, [1, 3, 5, 7, 9, 11]),
        ("every second", 5, [0, 2, 4]),
        ("every second", 1, [0]),
        ("first and last", 6, [0, 5]),
        ("first and last", 1, [0]),
        (1, 6, [5]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (4, 6, [1, 2, 4, 5]),
        ([-1, 0], 6, [0, 5]),
        (("b2", 4), 6, [2, 4]),
    ],
)
def test_places(layers, count, expected):
    assert kept_places([f"b{i}" for i in range(count)], layers) == expected


@pytest.mark.parametrize("count", range(1, 13))
def test_blocks_are_spread_as_losses_pair_them(count):
    teacher = [f"b{i}" for i in range(12)]
    places = kept_places(teacher, count)
    assert [teacher[place] for place in places] == [name for _, name in pair_by_depth(range(count), teacher)]
    assert len(set(places)) == count


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([0, 5], ValueError, r"'blocks.0' to 'blocks.4', or its place from -5 to 4, got 5"),
        ([-6], ValueError, r"got -6"),
        (["blocks.7"], ValueError, r"got 'blocks.7'"),
        (["head"], ValueError, r"got 'head'"),
        ([1, 1], ValueError, r"each once, got 1, which is there already"),
        ([4, "blocks.4"], ValueError, r"each once, got 'blocks.4', which is there already"),
        ([4, -1], ValueError, r"each once, got -1"),
        ([], ValueError, r"got an empty list"),
        (0, ValueError, r"expected to keep 1 to 5 of the 5 blocks, got 0"),
        (6, ValueError, r"expected to keep 1 to 5 of the 5 blocks, got 6"),
        ("every third", TypeError, r"'every second', 'first and last', how many, .* got 'every third'"),
        (True, TypeError, r"got True"),
        (2.5, TypeError, r"got 2.5"),
        ([0, 1.0], TypeError, r"expected places or names of blocks, got 1.0"),
    ],
)
def test_layers_that_cannot_be_kept_are_named(layers, error, message):
    with pytest.raises(error, match=message):
        keep_layers(Deep(), layers)


@pytest.mark.parametrize("name", ["head", "blocks.0", "none", ""])
def test_a_container_that_holds_no_blocks_is_named(name):
    with pytest.raises(ValueError, match=rf"expected container to name a ModuleList, .* got '{name}'; it has 'blocks'"):
        keep_layers(Deep(), 2, name)


def test_one_block_called_several_times_cannot_be_cut():
    teacher = Deep(3)
    teacher.blocks[2] = teacher.blocks[0]
    with pytest.raises(ValueError, match=r"blocks of 'blocks' to be different modules, got 3 blocks of 2 modules"):
        keep_layers(teacher, 1)


def test_a_model_without_blocks_is_named():
    with pytest.raises(ValueError, match=r"expected Linear to have a ModuleList or .* container='encoder.layers'"):
        keep_layers(nn.Linear(2, 2), 1)


# Narrowing


def test_the_units_of_largest_weights_stay():
    torch.manual_seed(3)
    teacher = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2))
    student = narrow(teacher, torch.zeros(1, 4), 0.5)
    into, out = (np.abs(teacher[i].weight.detach().numpy()).mean(axis=1 - i // 2) for i in (0, 2))
    kept = np.sort(np.argsort(into / into.mean() + out / out.mean())[-5:])  # 5 * (4 + 1 + 2) + 2 <= 86 / 2
    assert torch.equal(student[0].weight, teacher[0].weight[kept])
    assert torch.equal(student[0].bias, teacher[0].bias[kept])
    assert torch.equal(student[2].weight, teacher[2].weight[:, kept])
    assert teacher[0].out_features == 12


@pytest.mark.parametrize(("kind", "share"), [("bert", 0.85), ("gpt2", 0.7)])
def test_a_transformer_with_fewer_blocks_gets_narrower_ones(kind, share):
    teacher = keep_layers(MAKERS[kind]().eval(), 2)
    student = narrow(teacher, {"input_ids": IDS}, share)
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (student, teacher)]
    assert 0.8 * share < sizes[0] / sizes[1] <= share
    assert answer(student).shape == answer(teacher).shape
    student(**inputs(student))[0].sum().backward()


@pytest.mark.parametrize("share", [0.0, 1.0, 2.0, float("nan")])
def test_a_share_that_leaves_all_or_nothing_is_refused(share):
    with pytest.raises(ValueError, match=r"share is what stays of the parameters, in \(0, 1\), got"):
        narrow(Deep(), torch.zeros(1, 3), share)


def test_what_cannot_get_narrower_says_why():
    with pytest.raises(
        NothingToCompress, match=r"no channel of Linear can be removed: '.*': is an output of the forward"
    ):
        narrow(nn.Linear(3, 2), torch.zeros(1, 3), 0.5)
    with pytest.raises(ValueError, match=r"of the budget cannot go"):
        narrow(Deep(), torch.zeros(1, 3), 0.01)
    with pytest.raises(CompressError, match=r"cannot be traced"):
        narrow(Deep(), {"y": 1}, 0.5)
