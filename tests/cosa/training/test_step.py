"""One optimiser step: who learns, who follows, and what neither shares nor precision may change."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from cosa.config import Config, TrainConfig, override
from cosa.data import open_dataset, train_batches
from cosa.networks.network import CosaNetwork, emulates_bf16, in_bf16
from cosa.structures import Batch, Ranks
from cosa.training import step as step_module
from cosa.training.step import TERMS, TrainingState, build_state, cotraining, training_step, wrap

CLASSES = 6
ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"))


@pytest.fixture
def config(tiny_config: Config) -> Config:
    """Co-training from the first step on images small enough that every crop is padded."""
    return override(
        tiny_config,
        {"data.scale_min": 0.3, "data.scale_max": 0.45, "train.warmup": 0, "train.iterations": 8},
    )


@pytest.fixture
def batches(config: Config) -> list[Batch]:
    dataset = open_dataset(config.data, "train_aug")
    return [*itertools.islice(train_batches(dataset, config, start=0), 4)]


def fresh(config: Config) -> TrainingState:
    return build_state(config, CLASSES, ALONE.device)


def weights(network: CosaNetwork) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def take(state: TrainingState, batch: Batch, config: Config) -> dict[str, torch.Tensor]:
    return training_step(state, wrap(state, config, ALONE), batch, config, ALONE)


# The state before the first step


def test_assignment_starts_equal_to_online(config: Config) -> None:
    state = fresh(config)

    assert equal(weights(state.online), weights(state.assignment))


def test_equal_seeds_start_equal_and_others_do_not(config: Config) -> None:
    torch.rand(3)  # what came before does not matter
    first = weights(fresh(config).online)

    assert equal(first, weights(fresh(config).online))
    assert not equal(first, weights(fresh(override(config, {"train.seed": 1})).online))


@pytest.mark.parametrize(
    ("changes", "law"),
    [
        ({"cam.stride": 3}, r"cam.stride must divide the patch size 4, got 3"),
        ({"evaluation.size": 30}, r"evaluation.size must be a multiple of the patch size 4, got 30"),
        ({"data.crop_size": 30}, r"data.crop_size must be a multiple of the patch size 4, got 30"),
    ],
)
def test_sizes_that_do_not_fit_the_patch_are_refused(
    config: Config, changes: dict[str, Any], law: str
) -> None:
    with pytest.raises(ValueError, match=law):
        fresh(override(config, changes))


def test_both_networks_are_compiled_where_asked_for(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compiles(self: CosaNetwork) -> None:
        compiled.append(self)

    monkeypatch.setattr(CosaNetwork, "compile", compiles)

    state = fresh(override(config, {"train.compile": True}))

    assert compiled == [state.online, state.assignment]


# Who learns and who follows


@pytest.mark.parametrize("source", ["assignment", "online"])
@pytest.mark.parametrize("warmup", [0, 8])
def test_gradients_reach_every_part_of_online_that_has_a_term_and_nothing_else(
    config: Config, batches: list[Batch], source: str, warmup: int
) -> None:
    config = override(config, {"cam.source": source, "train.warmup": warmup})
    state = fresh(config)

    take(state, batches[0], config)

    silent = {name for name, p in state.online.named_parameters() if p.grad is None}
    assert silent == ({n for n in weights(state.online) if n.startswith("decoder.")} if warmup else set())
    assert all(p.grad is None for p in state.assignment.parameters())


@pytest.mark.parametrize("source", ["assignment", "online"])
def test_what_is_assigned_carries_no_gradient(
    config: Config, batches: list[Batch], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    seen = []

    def spy(output: Any, batch: Any, assigned: Any, *rest: Any, **more: Any) -> Any:
        seen.append(assigned)
        return whole(output, batch, assigned, *rest, **more)

    whole = step_module.learn
    monkeypatch.setattr(step_module, "learn", spy)
    config = override(config, {"cam.source": source})
    take(fresh(config), batches[0], config)

    (assigned,) = seen
    tensors = [assigned.spl, *vars(assigned.cam).values(), *vars(assigned.aux_cam).values()]
    assert not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize("source", ["assignment", "online"])
def test_the_network_of_the_setting_assigns_in_evaluation_mode(
    config: Config, batches: list[Batch], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    asked = []

    def spy(network: CosaNetwork, *rest: Any) -> Any:
        asked.append((network, network.training))
        return whole(network, *rest)

    whole = step_module.assign
    monkeypatch.setattr(step_module, "assign", spy)
    config = override(config, {"cam.source": source, "network.drop_path": 0.5})
    state = fresh(config)

    take(state, batches[0], config)

    assert asked == [(getattr(state, source), False)]
    assert state.online.training
    assert not state.assignment.training


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("warmup", [0, 2, 8])
def test_assignment_follows_online_after_every_step_by_the_law_of_the_ema(
    config: Config, batches: list[Batch], momentum: float, warmup: int
) -> None:
    config = override(config, {"ema.momentum": momentum, "train.warmup": warmup})
    state = fresh(config)
    expected = {name: tensor.double() for name, tensor in weights(state.assignment).items()}

    for batch in batches:
        before = weights(state.online)
        take(state, batch, config)
        after = weights(state.online)
        assert not equal(before, after)
        expected = {n: momentum * expected[n] + (1 - momentum) * after[n].double() for n in expected}

    for name, found in weights(state.assignment).items():
        torch.testing.assert_close(found.double(), expected[name], rtol=0, atol=1e-6)


def test_the_assignment_network_is_asked_before_it_follows(
    config: Config, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alg. 1: AN assigns, ON learns, then AN follows: the first assignment is that of the first weights."""
    state = fresh(config)
    first, seen = weights(state.assignment), []
    whole = step_module.assign

    def spy(network: CosaNetwork, *rest: Any) -> Any:
        seen.append(weights(network))
        return whole(network, *rest)

    monkeypatch.setattr(step_module, "assign", spy)

    take(state, batches[0], config)

    assert equal(seen[0], first)
    assert not equal(weights(state.assignment), first)


# Phases and randomness


def test_co_training_begins_after_as_many_steps_as_the_warm_up_has(
    config: Config, batches: list[Batch]
) -> None:
    config = override(config, {"train.warmup": 2})
    state = fresh(config)

    phases = [(cotraining(state, config), tuple(take(state, batch, config))) for batch in batches]

    assert phases == [(False, TERMS[:2])] * 2 + [(True, TERMS)] * 2


def test_thresholds_move_in_co_training_alone(config: Config, batches: list[Batch]) -> None:
    config = override(config, {"train.warmup": 2})
    state = fresh(config)
    updates = []

    for batch in batches:
        take(state, batch, config)
        updates.append(int(state.thresholds.cam.state_dict()["updates"]))

    assert updates == [0, 0, 1, 2]


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_a_step_is_a_function_of_seed_and_step_and_not_of_what_came_before(
    config: Config, batches: list[Batch], seed: int
) -> None:
    config = override(config, {"network.drop_path": 0.5, "csc.max_anchors": 8, "train.seed": seed})
    found = []
    for noise in (0, 7):
        state = fresh(config)
        torch.rand(noise)
        found.append([float(term) for term in take(state, batches[0], config).values()])

    assert found[0] == found[1]


def test_stochastic_depth_drops_other_paths_at_every_step(config: Config, batches: list[Batch]) -> None:
    config = override(config, {"network.drop_path": 0.5, "optim.lr": 1e-12})
    state = fresh(config)

    losses = [float(take(state, batches[0], config)["cls"]) for _ in range(2)]

    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_a_head_of_m_dagger_that_is_not_learned_stays_as_it_was_drawn(
    config: Config, batches: list[Batch]
) -> None:
    config = override(config, {"network.aux_head": False, "csc.weight": 0.0})
    state = fresh(config)
    before = weights(state.online)

    terms = take(state, batches[0], config)

    assert terms.keys() == {"cls", "c2s", "s2c"}
    after = weights(state.online)
    assert {name for name in before if torch.equal(before[name], after[name])} >= {"aux_cam_head.weight"}
    assert not torch.equal(before["cam_head.weight"], after["cam_head.weight"])


# What must not change a step


RELEASED = {
    "threshold.mode": "fixed",
    "threshold.xi": 0.45,
    "threshold.band": (0.2, 0.7),
    "c2s.average": "balanced",
    "s2c.cam": "relu",
    "cam.fusion": "sum",
    "cam.aux_fusion": "last",
}


@pytest.mark.parametrize(("count", "changes"), [(2, {}), (4, {}), (2, RELEASED)])
def test_micro_batches_are_the_whole_batch(
    config: Config, batches: list[Batch], count: int, changes: dict[str, Any]
) -> None:
    """All terms and all weights, on padded images, over several steps; also with the authors' options."""
    assert all((~batch.valid).sum() > 0 for batch in batches)
    config = override(config, changes)
    split = override(config, {"train.accumulate": count})
    whole_state, split_state = fresh(config), fresh(split)

    for batch in batches:
        whole, parts = take(whole_state, batch, config), take(split_state, batch, split)
        assert tuple(whole) == TERMS
        for name in TERMS:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-5, msg=name)

    expected = weights(whole_state.online)
    for name, found in weights(split_state.online).items():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-4)


def test_bf16_computes_the_networks_alone_in_bf16(
    config: Config, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and weights stay in fp32."""
    config = override(config, {"train.precision": "bf16"})
    state, half = fresh(config), []
    whole_learn, whole_forward = step_module.learn, CosaNetwork.forward

    def learn(*arguments: Any, **more: Any) -> Any:
        half.append(("learn", torch.is_autocast_enabled("cpu")))
        return whole_learn(*arguments, **more)

    def forward(self: CosaNetwork, *arguments: Any, **more: Any) -> Any:
        half.append(("forward", torch.is_autocast_enabled("cpu")))
        return whole_forward(self, *arguments, **more)

    monkeypatch.setattr(step_module, "learn", learn)
    monkeypatch.setattr(CosaNetwork, "forward", forward)

    terms = take(state, batches[0], config)

    assert set(half) == {("learn", False), ("forward", True)}
    assert {term.dtype for term in terms.values()} == {torch.float32}
    assert {p.dtype for p in state.online.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in state.online.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize(("precision", "fused"), [("bf16", {False}), ("fp32", {True})])
def test_what_learns_in_bf16_on_a_cpu_computes_its_attention_unfused(
    config: Config, precision: str, fused: set[bool]
) -> None:
    state = build_state(override(config, {"train.precision": precision}), 2, torch.device("cpu"))
    assert {block.attn.fused_attn for block in state.online.encoder.vit.blocks} == fused
    assert {block.attn.fused_attn for block in state.assignment.encoder.vit.blocks} == {True}


def test_bf16_says_nearly_what_fp32_says(config: Config, batches: list[Batch]) -> None:
    half = override(config, {"train.precision": "bf16"})

    found, expected = (take(fresh(each), batches[0], each) for each in (half, config))

    for name in ("cls", "aux_cls", "s2c"):
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=0.02)
        assert float(found[name]) != float(expected[name])


@pytest.mark.parametrize("has_it", [True, False])
def test_the_precision_auto_is_bf16_on_a_gpu_that_has_it_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, has_it: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_it)
    settings = TrainConfig(precision="auto")

    assert in_bf16(settings, torch.device("cuda")) is has_it
    assert not in_bf16(settings, torch.device("cpu"))
    assert emulates_bf16(torch.device("cuda")) is not has_it


@pytest.mark.parametrize(("capability", "emulates"), [("AVX2", True), ("AVX512", False), ("SVE256", False)])
def test_a_cpu_with_avx2_alone_emulates_bf16(
    monkeypatch: pytest.MonkeyPatch, capability: str, emulates: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)

    assert emulates_bf16(torch.device("cpu")) is emulates


# What is remembered of broken steps


def test_the_first_step_at_which_each_term_broke_is_remembered(
    config: Config, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, whole = fresh(config), step_module.learn
    broken = {1: ("s2c", torch.nan), 2: ("csc", torch.inf), 3: ("s2c", torch.nan)}

    def learn(*arguments: Any, **more: Any) -> Any:
        terms = whole(*arguments, **more)
        if state.step in broken:
            name, value = broken[state.step]
            terms[name] = torch.tensor(value)
        return terms

    monkeypatch.setattr(step_module, "learn", learn)
    monkeypatch.setattr(step_module, "objective", lambda terms, _: terms["cls"] + terms["aux_cls"])

    for batch in batches:
        take(state, batch, config)

    assert dict(zip(TERMS, state.bad_step.tolist(), strict=True)) == {
        "cls": -1,
        "aux_cls": -1,
        "c2s": -1,
        "aux_c2s": -1,
        "s2c": 1,
        "csc": 2,
    }
