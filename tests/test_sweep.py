import math
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from spice_ray.config import ImageRecipe
from spice_ray.errors import ConfigError
from spice_ray.recipe import load_recipe
from spice_ray.sweep import Range, Sweep, load_sweep
from spice_ray.trial_recipes import any_trial, check_trials, is_light, trial_recipe


def sweep_file(folder: Path, space: dict[str, Any], **more: Any) -> str:
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({"recipe": "digits", "space": space, **more}))
    return str(file)


def digits(*settings: str) -> ImageRecipe:
    recipe = load_recipe("digits", list(settings))
    assert isinstance(recipe, ImageRecipe)
    return recipe


def test_the_sweeps_beside_the_package_load_and_their_trials_can_be_run() -> None:
    files = sorted((Path(__file__).parent.parent / "tune_configs").glob("*.yaml"))
    assert {file.stem for file in files} >= {"thresholds", "prototypes", "contrastive", "images", "smoke"}
    for file in files:
        sweep = load_sweep(str(file))
        # One's own photographs have as many clusters as their owner says.
        check_trials(load_recipe(sweep.recipe, ["num_clusters=10"]), sweep)


@pytest.mark.parametrize(
    ("space", "more", "expected"),
    [
        ({"joint.confidnce": [0.9]}, {}, "unknown setting 'joint.confidnce'; did you mean 'joint.confidence'?"),
        ({"seed": [1, 2]}, {}, "seed is the same in all trials"),
        ({"num_clusters": [10, 11]}, {}, "num_clusters is the same in all trials"),
        ({"scale.workers": [1, 2]}, {}, "scale.workers is the same in all trials"),
        ({"reliable.labels": ["a.parquet"]}, {}, "reliable.labels is the same in all trials"),
        ({"reliable.index": ["exact", "ivf"]}, {}, "reliable.index is the same in all trials"),
        ({"heads.prior": [None]}, {}, "heads.prior is the same in all trials"),
        ({"joint.confidence": []}, {}, "space.joint.confidence=[] cannot be used; give a list of values, or a range"),
        ({"joint.confidence": 0.9}, {}, "space.joint.confidence=0.9 cannot be used; give a list of values, or a range"),
        ({"joint.confidence": [[0.9]]}, {}, "space.joint.confidence=[[0.9]] cannot be used"),
        ({"joint.confidence": [float("nan")]}, {}, "space.joint.confidence=[nan] cannot be used"),
        ({"joint.rounds": [1, 2]}, {}, "joint.rounds is the same in all trials"),
        ({"joint.confidence": {"unifrm": [0, 1]}}, {}, "unknown setting 'unifrm'; did you mean 'uniform'?"),
        ({}, {}, "space={} cannot be used"),
        ({"joint.confidence": [0.9]}, {"serach": "grid"}, "unknown setting 'serach'; did you mean 'search'?"),
        ({"joint.confidence": [0.9]}, {"search": "random"}, "search: random needs samples"),
        ({"joint.confidence": [0.9]}, {"search": "tpe"}, "search: tpe needs samples"),
        ({"joint.confidence": [0.9]}, {"samples": 3}, "samples goes with search: random or tpe"),
        ({"joint.confidence": [0.9]}, {"search": "random", "samples": 0}, "samples=0 cannot be used"),
        ({"joint.confidence": {"uniform": [0.5, 0.9]}}, {}, "joint.confidence is a range, which a grid cannot try"),
        ({"joint.confidence": [0.9]}, {"objective": "accuracy"}, "objective='accuracy' cannot be used"),
        (
            {"joint.confidence": [0.9]},
            {"trial": {"joint.confidence": 0.8}},
            "joint.confidence is in space and in trial",
        ),
        (
            {"joint.confidence": [0.9]},
            {"trial": {"joint.stepz": 8}},
            "unknown setting 'joint.stepz'; did you mean 'joint.steps'?",
        ),
        ({"joint.confidence": [0.9]}, {"trial": {"seed": 8}}, "trial: unknown setting 'seed'"),
        ({"joint.confidence": [0.9]}, {"trial": {"heads.prior": None}}, "heads.prior is the run's own"),
        ({"joint.confidence": [0.9]}, {"early_stopping": {"looks": 1}}, "early_stopping.looks=1 cannot be used"),
        ({"joint.confidence": [0.9]}, {"early_stopping": {"look": 3}}, "did you mean"),
    ],
)
def test_a_sweep_that_cannot_be_used_is_one_sentence_that_names_the_file(
    tmp_path: Path, space: dict[str, Any], more: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_sweep(sweep_file(tmp_path, space, **more))
    assert str(caught.value).startswith("sweep.yaml: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("range_", "expected"),
    [
        ({}, "a range needs uniform or log_uniform with two bounds"),
        ({"uniform": [0, 1], "log_uniform": [1, 2]}, "a range needs uniform or log_uniform with two bounds"),
        ({"uniform": [1]}, "uniform=[1] cannot be used; give two numbers"),
        ({"uniform": [0, "a"]}, "uniform=[0, 'a'] cannot be used; give two numbers"),
        ({"uniform": [True, 5]}, "uniform=[True, 5] cannot be used; give two numbers"),
        ({"uniform": "12"}, "uniform=12 cannot be used; give two numbers"),
        ({"uniform": {1: 2, 3: 4}}, "cannot be used; give two numbers"),
        ({"uniform": [0, float("nan")]}, "cannot be used; give two numbers"),
        ({"uniform": [0, float("inf")]}, "cannot be used; give two numbers"),
        ({"uniform": [0, 10**400]}, "cannot be used; give two numbers"),
        ({"uniform": [0, 1], "step": 5e-324}, "does not fit between the bounds 0 and 1"),
        ({"uniform": 3}, "uniform=3 cannot be used; give two numbers"),
        ({"uniform": [1, 1]}, "the bounds 1 and 1 of a range must rise"),
        ({"uniform": [2, 1]}, "the bounds 2 and 1 of a range must rise"),
        ({"log_uniform": [0, 1]}, "log_uniform needs bounds above 0, and 0 is not"),
        ({"uniform": [0, 1], "step": 0}, "step=0 does not fit between the bounds 0 and 1"),
        ({"uniform": [0, 1], "step": 2}, "step=2 does not fit between the bounds 0 and 1"),
    ],
)
def test_a_range_that_holds_nothing_is_refused(tmp_path: Path, range_: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_sweep(sweep_file(tmp_path, {"joint.lr": range_}, search="random", samples=2))
    assert expected in str(caught.value)


def draws(range_: Range, count: int = 4000) -> list[int | float]:
    rng = random.Random(0)
    return [range_.draw(rng) for _ in range(count)]


def test_ranges_are_even_on_their_own_scale_and_keep_their_bounds() -> None:
    even = draws(Range(uniform=(0.5, 0.9)))
    assert 0.5 <= min(even) < 0.51
    assert 0.89 < max(even) <= 0.9
    assert sum(even) / len(even) == pytest.approx(0.7, abs=0.01)
    logs = draws(Range(log_uniform=(1e-4, 1e-1)))
    assert min(logs) >= 1e-4
    assert max(logs) <= 1e-1
    assert sum(map(math.log10, logs)) / len(logs) == pytest.approx(-2.5, abs=0.05)
    assert sum(value < 1e-3 for value in logs) / len(logs) == pytest.approx(1 / 3, abs=0.03)


def test_steps_and_whole_numbers() -> None:
    assert sorted(set(draws(Range(uniform=(10, 50), step=10)))) == [10, 20, 30, 40, 50]
    assert sorted(set(draws(Range(uniform=(1, 4))))) == [1, 2, 3, 4]
    assert all(isinstance(value, int) for value in draws(Range(uniform=(10, 50), step=10), 50))
    tenths = sorted(set(draws(Range(uniform=(0.5, 0.95), step=0.1))))
    assert tenths == [0.5, 0.6, 0.7, 0.8, 0.9]  # what lies beyond the last step is no number of the range
    assert set(draws(Range(log_uniform=(1, 1000)))) <= set(range(1, 1001))
    assert Range(uniform=(0.5, 0.9), step=0.1).snap(0.74999) == 0.7


def test_trials_of_a_grid_are_all_combinations_and_of_a_random_search_depend_on_the_seed() -> None:
    space: dict[str, Any] = {"joint.confidence": [0.9, 0.95], "reliable.neighbors": [10, 20, 30]}
    grid = Sweep(recipe="digits", space=space)
    assert grid.trials(0) == [
        {"joint.confidence": c, "reliable.neighbors": n} for c in (0.9, 0.95) for n in (10, 20, 30)
    ]
    drawn = Sweep(
        recipe="digits", space={**space, "joint.lr": {"log_uniform": [1e-3, 1e-1]}}, search="random", samples=9
    )
    first, again, other = drawn.trials(0), drawn.trials(0), drawn.trials(1)
    assert first is not None
    assert len(first) == 9
    assert first == again != other
    assert all(trial["joint.confidence"] in (0.9, 0.95) and 1e-3 <= trial["joint.lr"] <= 1e-1 for trial in first)
    assert Sweep(recipe="digits", space=space, search="tpe", samples=4).trials(0) is None


def test_equal_trials_are_one() -> None:
    drawn = Sweep(recipe="digits", space={"joint.confidence": [0.9, 0.95]}, search="random", samples=20).trials(0)
    assert drawn is not None
    assert sorted(trial["joint.confidence"] for trial in drawn) == [0.9, 0.95]
    assert Sweep(recipe="digits", space={"joint.lr": [0.1, 0.1]}).trials(0) == [{"joint.lr": 0.1}]


@pytest.mark.parametrize(
    ("keys", "first", "judged"),
    [
        (["joint.confidence"], "joint", "joint"),
        (["reliable.min_consistency", "heads.lr"], "heads", "joint"),
        (["heads.lr", "heads.round_size"], "heads", "heads"),
        (["pretrain.temperature"], "encoder", "heads"),
        (["heads.views"], "encoder", "heads"),
        (["pretrain.momentum", "joint.ema"], "encoder", "joint"),
    ],
)
def test_what_a_sweep_varies_says_where_trials_part_and_where_they_are_judged(
    keys: list[str], first: str, judged: str
) -> None:
    sweep = Sweep(recipe="digits", space={key: [1] for key in keys})
    assert (sweep.first_stage, sweep.judged_by) == (first, judged)


def test_trials_train_in_their_own_process_only_where_stage_3_on_one_worker_is_all_they_do() -> None:
    light = Sweep(recipe="digits", space={"heads.lr": [0.01], "joint.ema": [0.9]})
    assert is_light(light, digits())
    assert not is_light(light, digits("scale.workers=2"))
    assert not is_light(light, digits("joint.rounds=2"))
    assert not is_light(Sweep(recipe="digits", space={"heads.lr": [0.01]}), digits())
    # Which heads a trial needs is not known before it begins.
    learning = Sweep(recipe="digits", space={"heads.lr": [0.01], "joint.ema": [0.9]}, search="tpe", samples=2)
    assert not is_light(learning, digits())


def test_every_value_of_a_sweep_is_checked_with_the_others_of_its_trial(tmp_path: Path) -> None:
    recipe = digits()
    fits = {"joint.encoder": ["wrn28_2"], "joint.init": ["scratch"], "joint.confidence": [0.5, 0.9]}
    check_trials(recipe, load_sweep(sweep_file(tmp_path, fits)))
    with pytest.raises(ConfigError, match=r"joint\.encoder=wrn28_2 needs joint\.init=scratch"):
        check_trials(recipe, load_sweep(sweep_file(tmp_path, {**fits, "joint.init": ["scratch", "stage2"]})))
    with pytest.raises(ConfigError, match=r"joint\.confidence=1\.5 cannot be used"):
        check_trials(recipe, load_sweep(sweep_file(tmp_path, {**fits, "joint.confidence": [0.5, 1.5]})))
    too_far = {"joint.confidence": {"uniform": [0.5, 1.5]}}
    with pytest.raises(ConfigError, match=r"joint\.confidence=1\.5 cannot be used"):
        check_trials(recipe, load_sweep(sweep_file(tmp_path, too_far, search="random", samples=2)))
    between = {"joint.labelled_batch": {"uniform": [32, 64]}}
    with pytest.raises(ConfigError, match=r"joint\.lanes=4 does not divide joint\.labelled_batch"):
        check_trials(recipe, load_sweep(sweep_file(tmp_path, between, search="random", samples=4)))
    # The winner would have to do without what makes this trial fit.
    alone = {"pretrain.symmetric": [True]}
    with pytest.raises(ConfigError, match=r"does not divide pretrain\.queue_size=384"):
        check_trials(recipe, load_sweep(sweep_file(tmp_path, alone, trial={"pretrain.queue_size": 256})))
    with pytest.raises(ConfigError, match=r"joint\.steps=-1 cannot be used"):
        check_trials(recipe, load_sweep(sweep_file(tmp_path, {"joint.ema": [0.5]}, trial={"joint.steps": -1})))


@pytest.mark.parametrize("key", ["joint.init", "reliable.min_consistency"])
def test_what_given_labels_make_idle_cannot_be_swept(key: str, tmp_path: Path) -> None:
    recipe = digits("reliable.labels=a.parquet")
    values = ["scratch", "stage2"] if key == "joint.init" else [0.5, 0.9]
    with pytest.raises(ConfigError, match=f"{key} cannot be swept with reliable.labels"):
        check_trials(recipe, load_sweep(sweep_file(tmp_path, {key: values})))
    check_trials(recipe, load_sweep(sweep_file(tmp_path, {"joint.confidence": [0.5, 0.9]})))
    scratch = digits("reliable.labels=a.parquet", "joint.init=scratch")
    with pytest.raises(ConfigError, match=r"heads\.lr cannot be swept with reliable\.labels"):
        check_trials(scratch, load_sweep(sweep_file(tmp_path, {"heads.lr": [0.1]})))


@pytest.mark.parametrize("setting", ["num_clusters=8-12", "heads.prior=estimate"])
def test_an_encoder_cannot_be_swept_where_the_embedding_settles_what_trials_are_compared_by(
    setting: str, tmp_path: Path
) -> None:
    recipe = digits(setting)
    with pytest.raises(ConfigError, match=r"is settled by the embedding, which this sweep varies"):
        check_trials(recipe, load_sweep(sweep_file(tmp_path, {"pretrain.temperature": [0.1]})))
    check_trials(recipe, load_sweep(sweep_file(tmp_path, {"heads.lr": [0.1]})))
    with pytest.raises(ConfigError, match=r"is settled by the embedding, which this sweep varies"):
        check_trials(recipe, load_sweep(sweep_file(tmp_path, {"heads.lr": [0.1]}, trial={"pretrain.epochs": 3})))


def test_what_has_no_effect_or_no_end_is_refused(tmp_path: Path) -> None:
    space = {"pretrain.temperature": [0.1]}
    with pytest.raises(ConfigError, match=r"pretrain\.temperature cannot be swept with pretrain\.weights"):
        check_trials(digits("pretrain.weights=w.safetensors"), load_sweep(sweep_file(tmp_path, space)))
    confidences = load_sweep(sweep_file(tmp_path, {"joint.confidence": [0.9]}))
    with pytest.raises(ConfigError, match=r"joint\.confidence cannot be swept with joint\.threshold=adaptive"):
        check_trials(digits("joint.threshold=adaptive"), confidences)
    check_trials(digits(), confidences)
    supervised = digits("reliable.labels=a.parquet", "joint.init=scratch")
    judged = sweep_file(tmp_path, {"joint.ema": [0.9]}, objective="neighbor_disagreement")
    with pytest.raises(ConfigError, match=r"objective=neighbor_disagreement needs an embedding"):
        check_trials(supervised, load_sweep(judged))
    vast = {key: [n / 1000 for n in range(400)] for key in ("joint.confidence", "joint.ema")}
    with pytest.raises(ConfigError, match=r"the sweep has 160000 trials, and 100000 are the most"):
        check_trials(digits(), load_sweep(sweep_file(tmp_path, vast)))


def test_settings_that_only_fit_with_those_of_their_trial_are_taken(tmp_path: Path) -> None:
    # Without joint.lanes of the space, the batch of all trials would fit no lanes.
    sweep = load_sweep(sweep_file(tmp_path, {"joint.lanes": [1, 2]}, trial={"joint.labelled_batch": 30}))
    with pytest.raises(ConfigError, match=r"joint\.lanes=4 does not divide"):
        trial_recipe(digits(), sweep, {})
    assert any_trial(digits(), sweep).joint.lanes == 1
    check_trials(digits(), sweep)


def test_what_trials_would_make_several_times_is_refused(tmp_path: Path) -> None:
    both = {"pretrain.temperature": [0.1, 0.2], "heads.views": [2, 4]}
    with pytest.raises(ConfigError, match=r"pretrain\.temperature and heads\.views cannot be swept together"):
        check_trials(digits(), load_sweep(sweep_file(tmp_path, both)))
    given = digits("reliable.labels=a.parquet")
    with pytest.raises(ConfigError, match=r"joint\.init cannot be given with reliable\.labels"):
        check_trials(given, load_sweep(sweep_file(tmp_path, {"joint.ema": [0.9]}, trial={"joint.init": "scratch"})))


def test_only_trials_that_may_be_equal_need_names() -> None:
    def may_repeat(search: str, tried: Any) -> bool:
        space = {"joint.confidence": tried, "reliable.neighbors": [10, 20]}
        samples = None if search == "grid" else 3
        return Sweep.model_validate(
            {"recipe": "digits", "space": space, "search": search, "samples": samples}
        ).may_repeat

    assert may_repeat("tpe", [0.5, 0.9])
    assert may_repeat("tpe", {"uniform": [0.5, 0.9], "step": 0.1})
    assert not may_repeat("tpe", {"uniform": [0.5, 0.9]})
    assert not may_repeat("grid", [0.5, 0.9])
    assert not may_repeat("random", [0.5, 0.9])


def test_trials_that_are_judged_once_cannot_stop_early(tmp_path: Path) -> None:
    stopping = {"early_stopping": {"looks": 3}}
    check_trials(digits(), load_sweep(sweep_file(tmp_path, {"joint.ema": [0.9]}, **stopping)))
    for space, setting in (({"heads.lr": [0.1]}, "seed=0"), ({"joint.ema": [0.9]}, "joint.rounds=2")):
        with pytest.raises(ConfigError, match="early_stopping judges trials within stage 3"):
            check_trials(digits(setting), load_sweep(sweep_file(tmp_path, space, **stopping)))


def test_what_all_trials_have_is_theirs_beside_their_own_values() -> None:
    sweep = Sweep(recipe="digits", space={"joint.ema": [0.9]}, trial={"joint.steps": 7, "scale.cpus_per_worker": 2})
    trial = trial_recipe(digits(), sweep, {"joint.ema": 0.9})
    assert (trial.joint.steps, trial.joint.ema, trial.scale.cpus_per_worker) == (7, 0.9, 2)


def test_a_vast_space_is_checked_in_a_moment(tmp_path: Path) -> None:
    space = {
        key: [n / 1000 for n in range(1000)]
        for key in ("joint.confidence", "joint.ema", "reliable.min_consistency", "reliable.min_confidence")
    }
    check_trials(digits(), load_sweep(sweep_file(tmp_path, space, search="random", samples=2)))
