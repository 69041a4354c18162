"""The Hugging Face model: it survives saving, and a continuation is a function of prompt and noise alone."""

import copy
import dataclasses
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from modeling.attention import Segments
from modeling.likelihood import target_nats
from modeling.text_dit import TextDiTConfig
from modeling.text_vae import TextVAEConfig
from modeling.textldm import TextLDM, TextLDMConfig
from tests.modeling.pretend_devices import PretendDevices, split_over

NEW = 10
PROMPTS = [[3, 4, 5, 6], [], [9], list(range(20, 31))]


def make_model(**options: object) -> TextLDM:
    """Tiny, with weights that give varied tokens."""
    torch.manual_seed(0)
    vae = TextVAEConfig(vocab_size=60, latent_dim=4, width=32, num_encoder_layers=1, num_decoder_layers=1, head_dim=16)
    dit = TextDiTConfig(latent_dim=4, width=32, num_layers=2, head_dim=16, **options)
    config = TextLDMConfig(
        dataclasses.asdict(vae), dataclasses.asdict(dit), num_steps=6, guidance_scale=3.0, max_window=32
    )
    model = TextLDM(config).eval()
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.25)
    model.vae.latents_mean.normal_()
    model.vae.latents_std.uniform_(0.5, 2.0)
    return model.requires_grad_(False)


def noises(num: int) -> list[torch.Tensor]:
    """One [NEW, Z] tensor each."""
    return list(torch.randn(num, NEW, 4, generator=torch.Generator().manual_seed(2)))


def lists(tokens: list[torch.Tensor]) -> list[list[int]]:
    return [ids.tolist() for ids in tokens]


@pytest.mark.parametrize("options", [{}, {"time_conditioning": "adaln_zero", "self_conditioning": True}], ids=str)
def test_saving_and_loading_keeps_everything(tmp_path: Path, options: dict) -> None:
    model = make_model(**options)
    model.config.eos_token_id = 7
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded, report = TextLDM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for name in ("vae", "dit", "times", "num_steps", "guidance_scale", "solver", "max_window", "eos_token_id"):
        assert getattr(loaded.config, name) == getattr(model.config, name)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert lists(loaded.generate(PROMPTS, NEW)) == lists(model.generate(PROMPTS, NEW))


@pytest.mark.parametrize("options", [{}, {"head": "categorical", "vocab_size": 60}], ids=str)
@pytest.mark.parametrize(
    "convert",
    [
        lambda model, folder: TextLDM.from_pretrained(folder, dtype=torch.bfloat16),
        lambda model, folder: TextLDM.from_pretrained(folder, dtype=torch.float16),
        lambda model, folder: copy.deepcopy(model).to(torch.bfloat16),
        lambda model, folder: copy.deepcopy(model).half(),
        lambda model, folder: TextLDM.from_pretrained(folder).bfloat16(),
    ],
)
def test_every_statistic_stays_in_fp32_however_the_model_is_converted(
    options: dict, convert: Callable, tmp_path: Path
) -> None:
    model = make_model(**options)
    for buffer in model.buffers():
        buffer.uniform_(0.5, 2.0)
    model.save_pretrained(tmp_path)
    converted = convert(model, tmp_path)
    assert {p.dtype for p in converted.parameters()} <= {torch.bfloat16, torch.float16}
    expected, found = dict(model.named_buffers()), dict(converted.named_buffers())
    assert found.keys() == expected.keys()
    assert len(found) == (5 if options else 2)
    for name, buffer in found.items():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, expected[name])
    assert [len(ids) for ids in converted.generate(PROMPTS, NEW)] == [NEW] * 4


def test_a_model_survives_pickling() -> None:
    model = make_model()
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(other) is TextLDM
        assert lists(other.generate(PROMPTS, NEW)) == lists(model.generate(PROMPTS, NEW))


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
@pytest.mark.parametrize("options", [{}, {"time_conditioning": "adaln_zero", "self_conditioning": True}], ids=str)
def test_a_continuation_does_not_depend_on_the_batch(solver: str, options: dict) -> None:
    model, noise = make_model(**options), noises(4)
    together = lists(model.generate(PROMPTS, NEW, noise=noise, solver=solver))
    alone = [lists(model.generate([ids], NEW, noise=[eps], solver=solver))[0] for ids, eps in zip(PROMPTS, noise)]
    assert together == alone
    backwards = lists(model.generate(PROMPTS[::-1], NEW, noise=noise[::-1], solver=solver))
    assert backwards[::-1] == together
    assert len({token for ids in together for token in ids}) > 5  # else anything would agree


def test_prompt_and_noise_both_matter() -> None:
    model, (one, other) = make_model(), noises(2)
    base = lists(model.generate([[3, 4, 5]], NEW, noise=[one]))
    assert lists(model.generate([[3, 4, 6]], NEW, noise=[one])) != base
    assert lists(model.generate([[3, 4, 5]], NEW, noise=[other])) != base
    assert lists(model.generate([[3, 4, 5]], NEW, noise=[one], guidance_scale=1.0)) != base
    unguided = lists(model.generate([[3, 4, 5]], NEW, noise=[one], guidance_interval=(0.9, 0.9)))
    assert unguided == lists(model.generate([[3, 4, 5]], NEW, noise=[one], guidance_scale=1.0))


def test_the_seed_is_the_noise_of_a_place() -> None:
    model = make_model()
    drawn = lists(model.generate(PROMPTS, NEW, seed=5))
    assert lists(model.generate(PROMPTS, NEW, seed=5)) == drawn
    assert lists(model.generate(PROMPTS, NEW, seed=6)) != drawn
    assert lists(model.generate(PROMPTS[:2], NEW, seed=5)) == drawn[:2]
    same_prompt = lists(model.generate([[3, 4]] * 2, NEW, seed=5))
    assert same_prompt[0] != same_prompt[1]


@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_a_prompt_with_a_seed_and_a_length_of_its_own_does_not_depend_on_its_place(spread: float) -> None:
    model = make_model(head="categorical", vocab_size=60)
    model.config.times["spread"] = spread
    seeds, news = [5, 2**63, 5, 9], [7, 3, NEW, 1]
    together = lists(model.generate(PROMPTS, news, seed=seeds))
    assert [len(ids) for ids in together] == news
    alone = [lists(model.generate([p], new, seed=seed))[0] for p, new, seed in zip(PROMPTS, news, seeds)]
    assert together == alone
    order = [2, 0, 3]
    again = lists(
        model.generate(*([given[i] for i in order] for given in (PROMPTS, news)), seed=[seeds[i] for i in order])
    )
    assert again == [together[i] for i in order]
    nats_N = model.nll(PROMPTS, TARGETS, num_times=5, seed=seeds)
    alone_N = [model.nll([p], [x], num_times=5, seed=seed) for p, x, seed in zip(PROMPTS, TARGETS, seeds)]
    torch.testing.assert_close(nats_N, torch.cat(alone_N), rtol=1e-4, atol=1e-4)
    same = lists(model.generate([[3, 4]] * 3, NEW, seed=np.array([5, 6, 5])))
    assert same[0] == same[2] != same[1]
    assert len(set(map(tuple, lists(model.generate([[3, 4]] * 3, NEW, seed=np.int64(5)))))) == 3


def test_every_step_reports_as_many_tokens_as_each_prompt_asked_for() -> None:
    model, seen = make_model(), []
    model.generate(PROMPTS, [1, 2, 3, 4], on_step=lambda step, t, tokens: seen.append([len(ids) for ids in tokens]))
    assert seen == [[1, 2, 3, 4]] * 6


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_every_seed_of_64_bits_is_one(seed: int) -> None:
    model = make_model()
    drawn = lists(model.generate(PROMPTS, NEW, seed=seed))
    assert lists(model.generate(PROMPTS, NEW, seed=seed)) == drawn
    assert lists(model.generate(PROMPTS, NEW, seed=(seed + 1) % 2**64)) != drawn


@pytest.mark.parametrize(
    "ids", [[3, 4, 5], (3, 4, 5), torch.tensor([3, 4, 5]), np.array([3, 4, 5]), list(np.array([3, 4, 5]))], ids=repr
)
def test_a_flat_list_of_ids_is_one_prompt(ids: object) -> None:
    model = make_model()
    expected = lists(model.generate([[3, 4, 5]], NEW))
    assert lists(model.generate(ids, NEW)) == expected
    assert torch.equal(model.nll(ids, [7, 8], num_times=3), model.nll([[3, 4, 5]], [[7, 8]], num_times=3))


def test_prompts_may_be_tensors() -> None:
    model = make_model()
    rows = [[3, 4, 5], [6, 7, 8]]
    expected = lists(model.generate(rows, NEW))
    assert lists(model.generate([torch.tensor(ids) for ids in rows], NEW)) == expected
    assert lists(model([torch.tensor(ids) for ids in rows], max_new_tokens=NEW)) == expected


def test_continuations_end_before_the_end_of_text() -> None:
    model, noise = make_model(), noises(4)
    whole = lists(model.generate(PROMPTS, NEW, noise=noise))
    eos = whole[0][3]
    expected = [ids[: ids.index(eos)] if eos in ids else ids for ids in whole]
    assert len(expected[0]) <= 3
    assert expected != whole
    assert lists(model.generate(PROMPTS, NEW, noise=noise, eos_token_id=eos)) == expected
    model.config.eos_token_id = eos
    assert lists(model.generate(PROMPTS, NEW, noise=noise)) == expected
    assert lists(model.generate(PROMPTS, NEW, noise=noise, eos_token_id=-1)) == whole  # an id that no token has


def test_every_step_reports_tokens_and_the_last_estimate_is_near_the_result() -> None:
    model, seen = make_model(), []
    result = model.generate(PROMPTS, NEW, on_step=lambda step, t, tokens: seen.append((step, t, lists(tokens))))
    assert [step for step, _, _ in seen] == list(range(6))
    assert seen[0][1] == 1.0
    assert all(late < early for (_, early, _), (_, late, _) in itertools.pairwise(seen))
    assert seen[-1][2] == lists(result)  # the last Euler step ends at its own one-step estimate


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_answered_as_transformers_does(side: str) -> None:
    model, prompts = make_model(), [[3, 4, 5, 6], [], [9]]
    news = lists(model.generate(prompts, NEW, seed=5))
    end = news[0][3]
    width, pads = 4, [[0] * (4 - len(ids)) for ids in prompts]
    rows = [pad + ids if side == "left" else ids + pad for pad, ids in zip(pads, prompts)]
    marks = [[0] * len(pad) + [1] * len(ids) for pad, ids in zip(pads, prompts)]
    given = {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor([m if side == "left" else m[::-1] for m in marks]),
    }
    found = model.generate(**given, max_new_tokens=NEW, seed=5)
    assert (found[:, :width].tolist(), found[:, width:].tolist()) == (rows, news)
    assert model.generate(**given, max_length=width + 3, seed=5).shape == (3, width + 3)
    ended = model.generate(**given, max_new_tokens=NEW, seed=5, eos_token_id=end, pad_token_id=1)
    for row, new in zip(ended[:, width:].tolist(), news):
        whole = new[: new.index(end) + 1] if end in new else new
        assert row == whole + [1] * (len(row) - len(whole))
    # Without a mask every token is the prompt's.
    assert lists(model.generate(torch.tensor([[0, 3]]), 2)[:, 2:]) == lists(model.generate([[0, 3]], 2))
    assert model.generate(max_new_tokens=2).tolist() == lists(model.generate([[]], 2))


def test_what_a_call_does_not_say_the_generation_configs_do() -> None:
    model, steps = make_model(), []
    ids, note = torch.tensor([[3, 4]]), lambda step, t, tokens: steps.append(step)
    assert model.generate(ids).shape == (1, 2 + 128)
    config = GenerationConfig(max_new_tokens=5, num_steps=3, guidance_scale=2.0, seed=7)
    expected = model.generate(ids, 5, num_steps=3, guidance_scale=2.0, seed=7)
    assert torch.equal(model.generate(ids, generation_config=config, on_step=note), expected)
    assert len(steps) == 3
    assert torch.equal(model.generate(ids, generation_config=config, seed=8), model.generate(ids, 5, 3, 2.0, seed=8))
    model.generation_config = config
    assert torch.equal(model.generate(ids), expected)
    assert model.generate(ids, max_length=6).shape == (1, 6)  # said in the call, against new tokens said elsewhere
    assert model.generate(ids, generation_config=GenerationConfig(max_length=6)).shape == (1, 6)
    end = int(expected[0, 4])
    model.generation_config = GenerationConfig(
        eos_token_id=[end, 59], max_new_tokens=5, num_steps=3, guidance_scale=2.0, seed=7
    )
    assert model.generate(ids).tolist() == [expected[0, : expected[0, 2:].tolist().index(end) + 3].tolist()]
    assert model.generate(ids, 4, do_sample=False, use_cache=True, token_type_ids=ids * 0, eos_token_id=-1).shape == (
        1,
        6,
    )


def test_temperature_has_transformers_name_too() -> None:
    model = make_model(head="categorical", vocab_size=60)
    model.dit.head.means.normal_()
    drawn = lists(model.generate(PROMPTS, NEW, token_temperature=20.0))
    assert lists(model.generate(PROMPTS, NEW, temperature=20.0)) == drawn != lists(model.generate(PROMPTS, NEW))
    model.generation_config.temperature = 20.0
    assert lists(model.generate(PROMPTS, NEW)) == drawn


def test_a_generator_gives_the_seed() -> None:
    model = make_model()
    first, again = (torch.Generator().manual_seed(3) for _ in range(2))
    drawn = [lists(model.generate([[3]], NEW, generator=first)) for _ in range(2)]
    assert drawn == [lists(model.generate([[3]], NEW, generator=again)) for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_several_sequences_of_a_prompt_are_as_if_it_stood_there_so_often() -> None:
    model, prompts = make_model(), [[3, 4], [9]]
    drawn = lists(model.generate(prompts, NEW, num_return_sequences=2))
    assert drawn == lists(model.generate([[3, 4], [3, 4], [9], [9]], NEW))
    assert model.generate(torch.tensor([[3, 4]]), NEW, num_return_sequences=3).shape == (3, 2 + NEW)
    seeded = lists(model.generate(prompts, [NEW, 3], num_return_sequences=2, seed=[7, 8]))
    assert seeded[:2] == lists(model.generate([prompts[0]] * 2, NEW, seed=7))
    assert seeded[2:] == lists(model.generate([prompts[1]] * 2, 3, seed=8))


def test_the_record_holds_trajectory_and_bounds() -> None:
    model, ids = make_model(), torch.tensor([[3, 4], [5, 6]])
    found = model.generate(ids, NEW, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(found.sequences, model.generate(ids, NEW))
    assert found.times.shape == (6,)
    assert torch.equal(found.trajectory[-1], found.sequences[:, 2:])
    assert (found.scores.shape, found.scores.dtype) == ((2,), torch.float64)
    # Measured with other noise than the texts were made of, which would flatter them.
    others = model._bounds(list(ids), list(found.sequences[:, 2:]), [(2**64 - 1, 0), (2**64 - 1, 1)])
    torch.testing.assert_close(found.scores, others)
    again = model.generate(
        ids[1:], NEW, return_dict_in_generate=True, output_scores=True, noise=[model.keyed_noise(0, 1, NEW)]
    )
    assert again.scores.isfinite().all()
    assert model.generate(ids, NEW, return_dict_in_generate=True).scores is None
    assert isinstance(model.generate([[3]], NEW, return_dict_in_generate=True).sequences, list)


def test_the_best_of_several_is_the_one_of_the_least_bound() -> None:
    model = make_model()
    options = {"return_dict_in_generate": True, "output_scores": True, "seed": [5, 6]}
    several = model.generate(PROMPTS[:2], NEW, num_return_sequences=4, **options)
    best = model.generate(PROMPTS[:2], NEW, best_of=4, **options)
    kept = several.scores.view(2, 4).argmin(1) + torch.tensor([0, 4])
    assert lists(best.sequences) == [lists(several.sequences)[i] for i in kept]
    assert torch.equal(best.scores, several.scores[kept])
    assert torch.equal(best.trajectory[-1][0], several.sequences[kept[0]])
    assert len(set(several.scores.tolist())) == 8


class Follower:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[list] = []

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value.tolist())

    def end(self) -> None:
        self.given.append(["end"])


def test_a_streamer_is_given_the_prompt_and_each_block() -> None:
    model, follower = make_model(), Follower()
    found = model.generate(torch.tensor([[3, 4]]), 7, block_size=3, streamer=follower)[0, 2:].tolist()
    assert follower.given == [[[3, 4]], found[:3], found[3:6], found[6:], ["end"]]


@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_beyond_the_window_each_block_follows_the_latest_tokens(spread: float) -> None:
    """Windows of 32: blocks of 16 behind 16 tokens, whatever else is in the call."""
    model = make_model(head="categorical", vocab_size=60)
    model.config.times["spread"] = spread
    prompt, seen = list(range(3, 23)), []
    model.dit.register_forward_pre_hook(lambda _, given: seen.append(given[3].lengths))
    found = model.generate([prompt], 40, seed=[9], guidance_scale=1.0)[0].tolist()
    assert seen == [(32,)] * 12 + [(32,)] * 6
    assert len(found) == 40
    assert model.generate([prompt], 16, seed=[9], guidance_scale=1.0, block_size=16)[0].tolist() == found[:16]
    # The second block is drawn as if the latest tokens were the prompt: those before them do not matter.
    assert found[16:32] != found[:16]
    together = lists(model.generate([[5], prompt, [7] * 50], [60, 40, 3], seed=[1, 9, 3], guidance_scale=1.0))
    assert together[1] == found
    assert [len(ids) for ids in together] == [60, 40, 3]
    longer = lists(model.generate([[1] * 9 + prompt[-16:]], 40, seed=[9], guidance_scale=1.0))
    assert longer[0] == lists(model.generate([[2] * 9 + prompt[-16:]], 40, seed=[9], guidance_scale=1.0))[0]
    assert not torch.equal(model.keyed_noise(9, 0, 4), model.keyed_noise(9, 0, 4, block=1))
    end = found[20]
    expected = found[: found.index(end)]
    seen.clear()
    assert lists(model.generate([prompt], 4000, seed=[9], guidance_scale=1.0, eos_token_id=end)) == [expected]
    assert len(seen) == 6 * (2 if len(expected) >= 16 else 1)


@pytest.mark.parametrize("options", [{}, {"head": "categorical", "vocab_size": 60}], ids=str)
def test_a_long_target_is_measured_in_blocks_with_true_context_before_each(options: dict) -> None:
    model, prompt, target = make_model(**options), list(range(3, 23)), [*range(20, 60), 5]
    (found,) = model.nll([prompt], [target], num_times=5, seed=[3])
    parts, text = [], prompt + target
    for block, (start, stop) in enumerate(((20, 36), (36, 52), (52, 61))):
        context_T, piece_T = torch.tensor(text[start - (32 - (stop - start)) : start]), torch.tensor(text[start:stop])
        noise = [torch.stack([model.keyed_noise(3, k, stop - start, block) for k in range(5)])]
        parts.append(target_nats(model.vae, model.dit, [context_T], [piece_T], noise, 0.6).bounds_NG[0, 0])
    expected = float(sum(parts))
    assert float(found) == pytest.approx(expected, rel=1e-5)
    together = model.nll([[4], prompt], [[5] * 70, target], num_times=5, seed=[1, 3])
    assert float(together[1]) == pytest.approx(expected, rel=1e-5)


def test_patience_ends_a_text_when_its_tokens_stopped_changing_whatever_else_is_in_the_call() -> None:
    model, seen = make_model(), []
    path = model.generate(PROMPTS, NEW, num_steps=40, return_dict_in_generate=True).trajectory
    expected, steps = [], []
    for i in range(len(PROMPTS)):
        way = [tokens[i].tolist() for tokens in path]
        step = next((k for k in range(3, 40) if way[k] == way[k - 1] == way[k - 2] == way[k - 3]), 39)
        expected.append(way[step])
        steps.append(step)
    found = model.generate(PROMPTS, NEW, num_steps=40, patience=4, on_step=lambda step, t, tokens: seen.append(step))
    assert lists(found) == expected
    assert seen[-1] == max(steps) < 39
    alone = model.generate(PROMPTS[:1], NEW, num_steps=40, patience=4, seed=[0])
    assert lists(alone) == expected[:1]


def test_the_prompt_is_encoded_alone_and_standardised() -> None:
    model = make_model()
    seen = []
    model.dit.register_forward_pre_hook(lambda _, given: seen.append(given))
    model.generate(PROMPTS, NEW, num_steps=1, guidance_scale=1.0)
    inputs_TZ, is_target_T, _, windows = seen[0][:4]
    assert list(windows.lengths) == [len(ids) + NEW for ids in PROMPTS]
    assert is_target_T.sum() == NEW * len(PROMPTS)
    mean_TZ = model.vae.encode(torch.tensor(PROMPTS[0]), Segments.from_lengths([4]))[0]
    torch.testing.assert_close(inputs_TZ[~is_target_T][:4], model.vae.standardize(mean_TZ))


@pytest.mark.parametrize(
    ("prompts", "new", "options", "message"),
    [
        ([], NEW, {}, "needs a prompt"),
        ([[1]], 0, {}, "max_new_tokens >= 1"),
        ([[60]], NEW, {}, "token id 60 is beyond the vocabulary of 60"),
        ([[-1]], NEW, {}, "token id -1"),
        ([[1]], NEW, {"solver": "rk4"}, "solver 'rk4' is unknown"),
        ([[1]], NEW, {"num_steps": -3}, "num_steps"),
        ([[1]], NEW, {"noise": [torch.zeros(NEW, 3)]}, "noise"),
        ([[1], [2]], NEW, {"noise": [torch.zeros(NEW, 4)]}, "noise"),
        ([[1]], NEW, {"seed": -1}, r"seed is -1; expected 0 to 18446744073709551615"),
        ([[1]], NEW, {"seed": 2**64}, "seed is 18446744073709551616"),
        ([[1], [2]], NEW, {"seed": [1]}, "seed has 1 values; expected one for all, or one for each of 2 prompts"),
        ([[1], [2]], [3, 4, 5], {}, "max_new_tokens has 3 values"),
        ([[1], [2]], [3, 0], {}, "max_new_tokens >= 1"),
        ([[1]], NEW, {"block_size": 33}, "block_size is 33; expected 1 to the 32 tokens"),
        ([[1]], NEW, {"block_size": 0}, "block_size is 0"),
        ([[1]], NEW, {"patience": 1}, "patience is 1; expected at least 2"),
        ([[1]], NEW, {"best_of": 0}, "best_of 0"),
        ([[1]], NEW, {"top_k": 5, "num_beams": 2}, "has no use for num_beams, top_k"),
        ([[1]], NEW, {"generation_config": GenerationConfig(top_p=0.5)}, "no use for top_p"),
        (torch.tensor([[1, 2]]), NEW, {"attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \[1, 3\]"),
        (torch.tensor([[1.5]]), NEW, {}, "expected integers"),
        ([[1], [2]], NEW, {"streamer": object()}, "a streamer follows one sequence, found 2"),
        ([[1] * 4], None, {"max_length": 4}, "max_new_tokens >= 1"),
        ([1, [2]], NEW, {}, "a text is given as"),
        ([[[1, 2]]], NEW, {}, r"of shape \[1, 2\]; expected its token ids"),
        ([[1.5]], NEW, {}, r"a torch.float32 tensor of shape \[1\]; expected its token ids"),
        ("once", NEW, {}, "a text is given as 'o'; expected its token ids"),
    ],
)
def test_mistakes(prompts: list, new: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model().generate(prompts, new, **options)


TARGETS = [[5, 6, 7, 8], [9, 9], [11, 12, 13], list(range(30, 45))]


@pytest.mark.parametrize(
    "options", [{}, {"head": "categorical", "vocab_size": 60}, {"self_conditioning": True}], ids=str
)
def test_bounds_on_the_likelihood_are_a_documents_own(options: dict) -> None:
    """Whatever else is in the batch; of prompt, target and noise alone."""
    model = make_model(**options)
    together_N = model.nll(PROMPTS, TARGETS, num_times=5)
    assert together_N.shape == (4,)
    assert together_N.isfinite().all()
    torch.testing.assert_close(model.nll(PROMPTS[:2], TARGETS[:2], num_times=5), together_N[:2], rtol=1e-4, atol=1e-4)
    assert not torch.isclose(model.nll([[7, 8, 9, 10]], TARGETS[:1], num_times=5), together_N[:1]).any()
    assert not torch.isclose(model.nll(PROMPTS[:1], [[5, 6, 7, 9]], num_times=5), together_N[:1]).any()
    assert not torch.isclose(model.nll(PROMPTS[:1], TARGETS[:1], num_times=5, t0=0.3), together_N[:1]).any()


@pytest.mark.parametrize("options", [{}, {"head": "categorical", "vocab_size": 60}], ids=str)
def test_a_bound_is_measured_from_tokens_means_where_the_head_knows_them(options: dict) -> None:
    """Without prompts nothing of such a bound is the encoder's."""
    model = make_model(**options)
    before_N = model.nll([[]] * len(TARGETS), TARGETS, num_times=5)
    torch.nn.init.normal_(model.vae.to_mean.weight, std=0.5)
    after_N = model.nll([[]] * len(TARGETS), TARGETS, num_times=5)
    assert torch.equal(before_N, after_N) == bool(options)


@pytest.mark.parametrize("solver", ["euler", "multistep"])
def test_where_training_spreads_tokens_times_a_continuation_is_still_of_prompt_and_seed_alone(solver: str) -> None:
    model = make_model(head="categorical", vocab_size=60)
    plain, plain_nats_N = lists(model.generate(PROMPTS, NEW, solver=solver)), model.nll(PROMPTS, TARGETS, num_times=5)
    model.config.times["spread"] = 1.5
    spread = lists(model.generate(PROMPTS, NEW, solver=solver))
    assert spread != plain
    assert lists(model.generate(PROMPTS[:2], NEW, solver=solver)) == spread[:2]
    assert lists(model.generate(PROMPTS, NEW, solver=solver)) == spread
    assert lists(model.generate(PROMPTS, NEW, solver=solver, seed=1)) != spread
    assert not torch.isclose(model.nll(PROMPTS, TARGETS, num_times=5), plain_nats_N).any()


def test_a_model_that_knows_the_frequencies_alone_has_their_cross_entropy_as_its_bound() -> None:
    model = make_model(head="categorical", vocab_size=60)
    torch.nn.init.zeros_(model.dit.head.to_logits.weight)
    torch.nn.init.zeros_(model.dit.head.to_shift.weight)
    frequencies_V = torch.rand(60).softmax(0)
    # An encoder without attention's mixing: every token's latent is its mean, exactly.
    for block in model.vae.encoder.blocks:
        torch.nn.init.zeros_(block.attention.out.weight)
    alone = model.vae.encode(torch.arange(60), Segments.from_lengths([1] * 60))[0]
    model.dit.head.means.copy_(model.vae.standardize(alone))
    model.dit.head.within_variance.fill_(1e-5)
    model.dit.head.log_frequencies.copy_(frequencies_V.log())
    targets = [torch.multinomial(frequencies_V, 16, replacement=True).tolist() for _ in range(64)]
    found = float(model.nll([[1, 2]] * 64, targets, t0=0.2, num_times=32).sum()) / 1024
    expected = -float(frequencies_V.log()[torch.tensor(targets)].mean())
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("prompts", "targets", "options", "message"),
    [
        ([], [], {}, "as many targets as prompts"),
        ([[1]], [[2], [3]], {}, "as many targets as prompts"),
        ([[1]], [[]], {}, "none of them empty"),
        ([[1]], [[60]], {}, "token id 60 is beyond the vocabulary"),
        ([[1]], [[2]], {"block_size": 40}, "block_size is 40"),
        ([[1]], [[2]], {"t0": 1.0}, "t0 is 1"),
        ([[1]], [[2]], {"num_times": 2}, "at least 3"),
    ],
)
def test_mistakes_in_asking_for_bounds(prompts: list, targets: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model().nll(prompts, targets, **options)


SPLITS = [
    {"vae": "cuda:0", "dit": "cuda:1"},
    {
        "vae.latents_mean": "cuda:1",
        "vae.latents_std": "cuda:1",
        "vae": "cuda:0",
        "vae.lm_head": "cuda:1",
        "dit.from_latent": "cuda:0",
        "dit.role": "cuda:1",
        "dit.time_mlp": "cuda:2",
        "dit.transformer.blocks.0": "cuda:0",
        "dit.transformer": "cuda:1",
        "dit.head": "cuda:2",
    },
]


@pytest.mark.parametrize("device_map", SPLITS, ids=["models", "blocks"])
@pytest.mark.parametrize(
    "options",
    [
        {"time_conditioning": "additive"},
        {"time_conditioning": "adaln_zero", "self_conditioning": True},
        {"head": "categorical", "vocab_size": 60},
    ],
    ids=str,
)
def test_a_model_split_over_devices_says_the_same(options: dict, device_map: dict) -> None:
    """Wherever its modules are put, no operation meets tensors of two devices."""
    model = make_model(**options)
    tokens, nats = lists(model.generate(PROMPTS, NEW)), model.nll(PROMPTS, TARGETS, num_times=3)
    split_over(model, device_map)
    with PretendDevices():
        assert lists(model.generate(PROMPTS, NEW)) == tokens
        assert torch.equal(model.nll(PROMPTS, TARGETS, num_times=3), nats)


@pytest.mark.parametrize("places", [{"vae": 0, "dit": "cpu"}, {"vae": "cpu", "dit": "disk"}], ids=str)
def test_a_model_that_is_not_all_on_devices_says_so(places: dict) -> None:
    model = make_model()
    model.hf_device_map = places
    with pytest.raises(
        ValueError, match=r"device_map put the model on .*(cpu|disk).* expected devices that hold all of it"
    ):
        model.generate(PROMPTS, NEW)
