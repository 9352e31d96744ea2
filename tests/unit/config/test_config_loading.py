"""Reading a config: YAML, overrides, and one-line errors that say what would be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pocl_ray.config import Config, TrainConfig, load_config
from pocl_ray.config.loading import dump_config
from pocl_ray.distill.losses import resolve_loss
from pocl_ray.errors import ConfigError

MINIMAL = """
name: run
data:
  train: {path: train.jsonl}
  dev: {path: dev.jsonl}
teacher: {path: teacher}
student: {num_layers: 2}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def refusal_of(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return refusal(path)


def test_a_minimal_config_takes_the_papers_settings(file: Path) -> None:
    config = load_config(file)
    assert (config.train.global_batch_rows, config.train.learning_rate, config.train.weight_decay) == (64, 1e-4, 0.01)
    assert (config.curriculum.num_buckets, config.curriculum.interval_epochs) == (4, 8)
    assert config.curriculum.hand_off == "best"
    assert config.evaluation.seeds == (10, 20, 30, 40, 50)


# Files


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "none.yaml: no such config file" in refusal(tmp_path / "none.yaml")


def test_a_directory_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    assert "cannot be read as text" in refusal(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"name: \xff\xfe")
    assert "cannot be read as text" in refusal(tmp_path / "binary.yaml")


@pytest.mark.parametrize("text", ["name: [1, 2", "name: a\n\tb: c", "a: b: c", "name: !!python/object:os.system x"])
def test_what_is_no_safe_yaml_is_refused(file: Path, text: str) -> None:
    assert "not valid YAML" in refusal_of(file, text)


@pytest.mark.parametrize(("text", "kind"), [("- a", "list"), ("just words", "str")])
def test_a_config_must_be_a_mapping(file: Path, text: str, kind: str) -> None:
    assert f"a config is a mapping of keys to values, not {kind}" in refusal_of(file, text)
    assert "is empty; `pocl-ray init` writes a config" in refusal_of(file, "")


def test_a_key_that_stands_twice_is_refused_with_its_line(file: Path) -> None:
    message = refusal_of(file, MINIMAL + "train:\n  eps: 1e-8\n  eps: 1e-6\n")
    assert "'eps' stands twice" in message and "line 10" in message


def test_a_key_that_is_a_list_is_refused(file: Path) -> None:
    assert "not valid YAML" in refusal_of(file, MINIMAL + "? [a, b]\n: 1\n")


def test_a_key_that_is_a_number_is_refused(file: Path) -> None:
    assert "1" in refusal_of(file, MINIMAL + "1: 2\n")


def test_anchors_and_merge_keys_work(file: Path) -> None:
    text = MINIMAL.replace("teacher: {path", "teacher: &model {dtype: bfloat16, path")
    file.write_text(text.replace("student: {num_layers: 2}", "student: {<<: *model, path: small}"), encoding="utf-8")
    config = load_config(file)
    assert (config.student.dtype, config.student.path) == ("bfloat16", "small")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("2.5e-3", 2.5e-3), ("1e+0", 1.0), ("3", 3.0), (".5", 0.5)]
)
def test_numbers_are_read_as_in_yaml_1_2(file: Path, text: str, value: float) -> None:
    assert load_config(file, [f"train.learning_rate={text}"]).train.learning_rate == value
    file.write_text(f"{MINIMAL}train: {{learning_rate: {text}}}\n", encoding="utf-8")
    assert load_config(file).train.learning_rate == value


def test_words_that_only_resemble_numbers_stay_words(file: Path) -> None:
    assert load_config(file, ["name=1e-4b"]).name == "1e-4b"
    assert load_config(file, ["name='1e4'"]).name == "1e4"


# Unknown keys


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("trian.eps=1", "unknown key trian; did you mean train?"),
        ("train.learning_rte=1e-3", "unknown key train.learning_rte; did you mean train.learning_rate?"),
        ("data.train.colums={}", "unknown key data.train.colums; did you mean data.train.columns?"),
        ("curriculum.kd_ratio.strat=1", "did you mean curriculum.kd_ratio.start?"),
        ("teacher.sft={train: {learning_rat: 1}}", "did you mean teacher.sft.train.learning_rate?"),
        ("data.tests={selfinst: {pth: x, path: y}}", "did you mean data.tests.selfinst.path?"),
        ("evaluation.generation.top_k=5", "did you mean evaluation.generation.top_p?"),
        ("control={kd_ratoi: 1}", "did you mean control.kd_ratio?"),
        ("student.num_layer=3", "did you mean student.num_layers?"),
        ("report.zzz=1", "unknown key report.zzz; known: num_examples"),
    ],
)
def test_an_unknown_key_names_the_nearest_right_one_at_any_depth(file: Path, override: str, hint: str) -> None:
    assert hint in refusal(file, override)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tracking=wandb", "tracking: a list is expected, such as [a, b] (given: 'wandb')"),
        ("evaluation.tasks=arc_easy", "evaluation.tasks: a list is expected"),
        ("train=3", "train: keys are expected, such as {key: value} (given: 3)"),
        ("methods/plian", "name a file that ends in .yaml; did you mean methods/plain?"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_without_types_of_python(file: Path, override: str, says: str) -> None:
    assert says in refusal(file, override)


def test_all_mistakes_stand_in_one_line(file: Path) -> None:
    message = refusal(file, "trian=1", "train.eps=-1", "seed=x")
    assert "unknown key trian" in message and "train.eps" in message and "seed" in message


def test_missing_keys_are_named(file: Path) -> None:
    message = refusal_of(file, "name: run\ndata: {dev: {path: x}}\nteacher: {path: t}\nstudent: {path: s}\n")
    assert "missing key data.train" in message


# Values


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("train.learning_rate=0", "train.learning_rate"),
        ("train.learning_rate=fast", "train.learning_rate"),
        ("train.learning_rate=.inf", "train.learning_rate"),
        ("train.weight_decay=.nan", "train.weight_decay"),
        ("train.warmup_ratio=1", "train.warmup_ratio"),
        ("train.betas=[0.9]", "train.betas"),
        ("train.betas=[0.9, 1.0]", "train.betas"),
        ("train.zero_stage=4", "train.zero_stage"),
        ("train.precision=fp8", "train.precision"),
        ("train.global_batch_rows=1.5", "train.global_batch_rows"),
        ("train=null", "train"),
        ("curriculum.num_buckets=0", "curriculum.num_buckets"),
        ("curriculum.kd_ratio=1.1", "curriculum.kd_ratio"),
        ("curriculum.kd_ratio=.nan", "curriculum.kd_ratio"),
        ("curriculum.kd_ratio=[0.1, 0.2, 0.3, -0.4]", "curriculum.kd_ratio"),
        ("curriculum.kd_temperature=0", "curriculum.kd_temperature"),
        ("curriculum.kd_temperature={start: 0.004, end: 2}", "curriculum.kd_temperature"),
        ("curriculum.kd_temperature=[]", "curriculum.kd_temperature"),
        ("curriculum.kd_temperature=warm", "curriculum.kd_temperature"),
        ("curriculum.kd_temperature={start: 1}", "curriculum.kd_temperature"),
        ("curriculum.kd_temperature={shape: constant, start: 1, end: 2}", "curriculum.kd_temperature"),
        ("curriculum.kd_temperature={values: [1, 1, 1, 1], start: 1}", "curriculum.kd_temperature"),
        ("data.max_reject_share=1.5", "data.max_reject_share"),
        ("data.tests={a/b: {path: x}}", "data.tests"),
        ("data.tests={dev: {path: x}}", "data.tests"),
        ("data.train.columns={promt: x}", "data.train.columns"),
        ("evaluation.seeds=[]", "evaluation.seeds"),
        ("evaluation.seeds=[1, 1]", "evaluation.seeds"),
        ("evaluation.generation.top_p=0", "evaluation.generation.top_p"),
        ("scaling.num_workers=0", "scaling.num_workers: at least 1 worker is needed, not 0"),
        ("scaling.labels={pool: in()}", "scaling.labels: pool: 'in()' is no label selector; write a, !a, in(a,b) or"),
        ("scaling.num_workers=[0, 2]", "scaling.num_workers: at least 1 worker is needed, not 0"),
        ("scaling.num_workers=[4, 2]", "scaling.num_workers: the least, 4, is above the most, 2; write [2, 4]"),
        ("scaling.num_workers=[1, 2, 4]", "scaling.num_workers: an elastic run has two numbers"),
        ("scaling.num_workers=many", "scaling.num_workers: an integer, or [least, most]"),
        ("scaling.num_workers=[1, 2.5]", "scaling.num_workers: an integer, or [least, most]"),
        ("teacher.sft={train: {betas: [0.9, 1.5]}}", "teacher.sft.train.betas"),
        ("name=../elsewhere", "name"),
        ("name=''", "name"),
        ("tokenizer.train_vocab_size=10", "tokenizer.train_vocab_size"),
    ],
)
def test_a_value_out_of_range_names_its_key(file: Path, override: str, place: str) -> None:
    message = refusal(file, override)
    assert message.startswith((f"{file}: {place}", f"{file}: missing key {place}"))


# Keys that do not go together


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.zero_stage=0"], "train.zero_stage 0 works with train.precision fp32 alone"),
        (["train.zero_stage=0", "train.precision=fp32", "teacher.sft={train: {precision: bf16}}"], "teacher.sft.train"),
        (["data.holdout_rows=5"], "give either dev or holdout_rows, not both"),
        (["data.dev=null"], "a dev set is needed"),
        (["data.max_tokens=256"], "max_prompt_tokens must be smaller than max_tokens"),
        (["teacher={architecture: {model_type: llama}, sft: {}}"], "set tokenizer.train_vocab_size"),
        (["teacher={architecture: {model_type: llama}}", "tokenizer.train_vocab_size=300"], "give teacher.sft as well"),
        (["teacher.architecture={}"], "exactly one of path and architecture"),
        (["teacher={}"], "exactly one of path and architecture"),
        (["student.path=x"], "exactly one of path, architecture and num_layers"),
        (["tokenizer={path: x, train_vocab_size: 300}"], "either path or train_vocab_size"),
        (["scaling.num_workers=3"], "train.global_batch_rows (64) must be a multiple of scaling.num_workers (3)"),
        (["scaling.num_workers=[2, 6]"], "train.global_batch_rows (64) must be a multiple of scaling.num_workers (6)"),
        (["scaling.num_workers=4", "student.sft={train: {global_batch_rows: 6}}"], "student.sft.train"),
        (
            ["train.micro_batch_rows=4", "train.micro_batch_tokens=512"],
            "train: micro_batch_tokens (512) stands in place of micro_batch_rows (4); remove one of them",
        ),
        (
            ["train.micro_batch_rows=4", "train.micro_batch_tokens=auto"],
            "train: micro_batch_tokens (auto) stands in place of micro_batch_rows (4); remove one of them",
        ),
        (["train.micro_batch_tokens=much"], "train.micro_batch_tokens: a whole number of tokens, 1 or more, or auto"),
        (["train.micro_batch_tokens=0"], "train.micro_batch_tokens: a whole number of tokens, 1 or more, or auto"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(file: Path, overrides: list[str], says: str) -> None:
    assert says in refusal(file, *overrides)


def test_sft_takes_the_training_keys_that_it_does_not_set(file: Path) -> None:
    config = load_config(file, ["train.eps=1e-6", "student.sft={train: {learning_rate: 1e-3, betas: [0.8, 0.9]}}"])
    assert config.student.sft is not None
    train = config.sft_train(config.student.sft)
    assert isinstance(train, TrainConfig)
    assert (train.eps, train.learning_rate, train.betas) == (1e-6, 1e-3, (0.8, 0.9))


@pytest.mark.parametrize(
    ("overrides", "distills_with", "tunes_with"),
    [
        ([], (8, None), (8, None)),
        (["train.micro_batch_tokens=512"], (8, 512), (8, 512)),
        (["train.micro_batch_tokens=auto"], (8, "auto"), (8, "auto")),
        (["train.micro_batch_rows=4", "student.sft.train.micro_batch_tokens=256"], (4, None), (8, 256)),
        (["train.micro_batch_tokens=512", "student.sft.train.micro_batch_rows=2"], (8, 512), (2, None)),
    ],
)
def test_a_token_budget_takes_the_place_of_rows_and_the_resolved_config_is_read_again(
    file: Path, overrides: list[str], distills_with: Any, tunes_with: Any
) -> None:
    config = load_config(file, ["student.sft={}", *overrides])
    again = Config.model_validate(yaml.safe_load(dump_config(config)))
    for one in (config, again):
        assert one.student.sft is not None
        tuned = one.sft_train(one.student.sft)
        assert (one.train.rows_at_once, one.train.micro_batch_tokens) == distills_with
        assert (tuned.rows_at_once, tuned.micro_batch_tokens) == tunes_with


# Overrides


def test_overrides_reach_any_depth_and_make_what_is_missing(file: Path) -> None:
    overrides = ["teacher.sft.train.learning_rate=1e-3", "data.tests.new.path=a.csv", "evaluation.seeds=[1, 2]"]
    config = load_config(file, [*overrides, "data.dev.path='a=b.jsonl'", "storage_path=s3://bucket/a=b"])
    assert config.teacher.sft is not None and config.teacher.sft.train.learning_rate == 1e-3
    assert config.data.tests["new"].path == "a.csv"
    assert config.evaluation.seeds == (1, 2)
    assert config.data.dev is not None and config.data.dev.path == "a=b.jsonl"
    assert config.storage_path == "s3://bucket/a=b"


def test_later_overrides_win_and_null_resets_to_nothing(file: Path) -> None:
    config = load_config(file, ["seed=1", "seed=2", "data.dev=null", "data.holdout_rows=3"])
    assert (config.seed, config.data.dev) == (2, None)


@pytest.mark.parametrize("override", ["seed", "=3", " seed=3", "seed =3", ""])
def test_an_override_without_key_or_value_says_how_to_write_it(file: Path, override: str) -> None:
    assert "write it as key.sub=value" in refusal(file, override)


@pytest.mark.parametrize("override", ["evaluation.seeds=[1", "name={a: b: c}", "name='x"])
def test_an_override_that_is_no_yaml_is_named(file: Path, override: str) -> None:
    assert override in refusal(file, override)


@pytest.mark.parametrize(
    "override", ["seed.x=1", "train..eps=1", "curriculum.num_buckets.a.b=2", "evaluation.seeds.0=3"]
)
def test_an_override_into_a_plain_value_is_refused(file: Path, override: str) -> None:
    assert override.split(".")[0] in refusal(file, override)


def test_an_override_into_a_list_does_not_drop_the_list(file: Path) -> None:
    file.write_text(MINIMAL + "curriculum: {kd_ratio: [0.1, 0.2, 0.3, 0.4]}\n", encoding="utf-8")
    assert "curriculum.kd_ratio" in refusal(file, "curriculum.kd_ratio.decimals=1")


# Back to YAML


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.learning_rate=1e-5", "train.eps=1e-12", "curriculum.kd_ratio=[0.1, 0.2, 0.3, 1.0]"],
        ["curriculum.kd_temperature=1.5", "control={}", "teacher.sft={num_epochs: 3, train: {betas: [0.8, 0.9]}}"],
        [
            "curriculum.kd_temperature={shape: cosine, start: 1, end: 3, decimals: null}",
            "data.prompt_template='ä\n{input}'",
        ],
        ["data.train.columns={output: '1e5', prompt: 'yes'}", "train.deepspeed={zero_optimization: {a: 1e-4}}"],
    ],
)
def test_a_dumped_config_reads_back_the_same(file: Path, tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(file, overrides)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_config(config), encoding="utf-8")
    assert load_config(dumped) == config
    assert Config.model_validate(yaml.safe_load(dump_config(config))) == config, "any YAML reader may read it"


def test_a_config_cannot_be_changed_after_it_is_read(file: Path) -> None:
    config: Any = load_config(file)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


@pytest.mark.parametrize(("given", "bounds"), [("3", (3, 3)), ("[2, 4]", (2, 4)), ("[4, 4]", (4, 4))])
def test_one_number_of_workers_is_fixed_and_two_are_elastic(file: Path, given: str, bounds: tuple[int, int]) -> None:
    config = load_config(file, [f"scaling.num_workers={given}", "train.global_batch_rows=48"])
    assert (config.scaling.min_workers, config.scaling.max_workers) == bounds
    assert Config.model_validate(yaml.safe_load(dump_config(config))) == config


def test_parameters_stay_the_numbers_that_they_were_written_as(file: Path) -> None:
    config = load_config(file, ["distill.loss=top_k_kl", "distill.loss_args={k: 5}", "curriculum.pacing_args={a: 1.0}"])
    assert type(config.distill.loss_args["k"]) is int and type(config.curriculum.pacing_args["a"]) is float
    assert resolve_loss(config.distill.loss, config.distill.loss_args).params == {"k": 5}
    assert Config.model_validate(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("distill.loss_args={beta: half}", "distill.loss_args.beta: a finite number is needed (given: 'half')"),
        ("distill.loss_args={beta: .nan}", "distill.loss_args.beta: a finite number is needed (given: nan)"),
        ("rollout={mode: mixed, loss: js_distance, loss_args: {lam: true}}", "rollout.loss_args.lam: a finite number"),
        ("curriculum.kd_ratio=high", "curriculum.kd_ratio: a schedule is a number, a list of one number a stage, or"),
        ("curriculum.kd_ratio=[]", "curriculum.kd_ratio: a schedule is a number, a list"),
        ("distill.token_weight=entropy", "distill.token_weight: Input should be 'none', 'teacher_entropy', 'teac"),
    ],
)
def test_what_is_no_number_or_no_choice_is_told_in_one_line(file: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    assert says in str(caught.value) and "\n" not in str(caught.value)
