"""Settings from YAML, --smoke and the command line; their errors in one line; names of runs; exit codes."""

import importlib
import pickle
import re
import sys

import pytest

from dlops_dist.command_line import read_command_line, read_settings
from dlops_dist.config import LATER, default_name, result_settings
from dlops_dist.config.section import setting_names
from dlops_dist.engine import prepare
from dlops_dist.engine.run_folder import RunFolder
from dlops_dist.errors import RunError, UserError, exit_code_of
from dlops_dist.recipes.q1 import Settings as Q1


@pytest.fixture
def read(tmp_path):
    """Settings of q1 from the text of a YAML file and arguments."""

    def settings(text: str, *arguments: str) -> Q1:
        (tmp_path / "settings.yaml").write_text(text)
        return read_settings("q1", ["--config", str(tmp_path / "settings.yaml"), *arguments])

    return settings


def flat(values: dict, prefix: str = "") -> dict:
    """{dotted name: value}."""
    pairs = {}
    for name, value in values.items():
        if isinstance(value, dict):
            pairs.update(flat(value, f"{prefix}{name}."))
        else:
            pairs[prefix + name] = value
    return pairs


# which value wins


def test_the_defaults_come_from_the_tasks_own_file():
    settings = read_settings("q1", [])
    assert (settings.epochs, settings.global_batch_size, settings.data.shards) == (10, 128, "shards/tiny-imagenet")
    assert (settings.loss, settings.optimizer.lr, settings.triplet.margin) == ("ce", 0.1, 0.5)


def test_the_tasks_own_file_is_not_taken_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "q1.yaml").write_text("epochs: 99")
    monkeypatch.chdir(tmp_path)
    assert read_settings("q1", []).epochs == 10


def test_a_bare_name_is_a_file_there_or_a_config_that_comes_with_the_package(tmp_path, monkeypatch, user_error):
    monkeypatch.chdir(tmp_path)
    assert read_settings("q1", ["--config", "quickstart"]).name == "quickstart"
    with user_error("quickstart.yaml", "No such file"):
        read_settings("q1", ["--config", "quickstart.yaml"])
    (tmp_path / "quickstart").write_text("epochs: 99")
    assert read_settings("q1", ["--config", "quickstart"]).epochs == 99


def test_the_command_line_wins_over_smoke_and_smoke_over_yaml(read):
    text = "epochs: 7\nseed: 5\nmodel: {width: 32, norm: local}\noptimizer: {lr: 0.02, momentum: 0.5}"
    yaml_only = read(text)
    assert (yaml_only.epochs, yaml_only.model.width, yaml_only.local) == (7, 32, False)
    smoke = read(text, "--smoke")
    assert (smoke.smoke, smoke.local, smoke.epochs) == (True, True, 2)
    assert smoke.model.width < 32
    assert (smoke.seed, smoke.model.norm, smoke.optimizer.lr) == (5, "local", 0.02)
    line = read(text, "--smoke", "--epochs", "3", "--model.width=16", "--optimizer.lr", "0.3")
    assert (line.epochs, line.model.width, line.optimizer.lr) == (3, 16, 0.3)
    assert (line.local, line.seed, line.model.norm, line.optimizer.momentum) == (True, 5, "local", 0.5)


def test_smoke_in_a_file_implies_local_too(read):
    assert read("smoke: true").local


def test_smoke_takes_one_process_whatever_the_file_says(read):
    assert read("workers: 2", "--smoke").workers is None


def test_paths_are_resolved_where_the_command_runs(shapes_shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepared = prepare("q1", Q1(data={"shards": str(shapes_shards), "cache_dir": "cache"}))
    assert (prepared.data.cache_dir, prepared.runs_dir) == (str(tmp_path / "cache"), str(tmp_path / "runs"))


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--augment.no-flip"], "augment.flip", False),
        (["--data.no-drop-last"], "data.drop_last", False),
        (["--data.drop_last", "--workers", "3"], "workers", 3),
        (["--data.val_fraction", "0.25"], "data.val_fraction", 0.25),
        (["--data.samples-per-class=8"], "data.samples_per_class", 8),
        (["--epochs", "2", "--epochs", "4"], "epochs", 4),
        (["--optimizer.clip-norm", "None"], "optimizer.clip_norm", None),
        (["--name", "a-run_1.2=b"], "name", "a-run_1.2=b"),
        (["--compile", "False"], "compile", False),
        (["--compile"], "compile", True),
        (["--compile", "None"], "compile", None),
        (["--no-deterministic"], "deterministic", False),
        (["--flip-test", "True"], "flip_test", True),
        (["--data.no_drop_last"], "data.drop_last", False),
    ],
)
def test_arguments_set_what_they_name(arguments, name, value):
    assert flat(read_settings("q1", arguments).model_dump())[name] == value


@pytest.mark.parametrize("text", ["", "# nothing\n", "data: {}\n"])
def test_a_file_that_says_nothing_leaves_the_defaults(text, read):
    settings = read(text)
    assert settings.model_copy(update={"config": None}) == Q1()


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("optimizer: {lr: 1e-3}", "optimizer.lr", 0.001),
        ("wandb: off", "wandb", "off"),
        ("workers: null", "workers", None),
        ("compile: no", "compile", False),
        ("name: true-colours", "name", "true-colours"),
    ],
)
def test_what_yaml_reads_in_its_own_way_is_still_understood(text, name, value, read):
    assert flat(read(text).model_dump())[name] == value


def test_settings_cannot_be_changed_after_they_were_read():
    settings = Q1()
    with pytest.raises(ValueError, match="frozen"):
        settings.epochs = 3
    with pytest.raises(ValueError, match="frozen"):
        settings.optimizer.lr = 3


def helped(capsys, name, *arguments) -> list[str]:
    """Lines of the help."""
    with pytest.raises(SystemExit) as stop:
        read_settings(name, ["--help", *arguments])
    assert stop.value.code in (0, None)
    return capsys.readouterr().out.splitlines()


def test_help_in_a_pipe_has_a_line_for_each_setting_with_its_text_and_its_value(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    lines = helped(capsys, "q1")
    for name in setting_names(Q1):
        (line,) = [line for line in lines if line.split()[:1] == [f"--{name.replace('_', '-')}"]]
        assert line.endswith(f"(default: {flat(read_settings('q1', []).model_dump())[name]})")
    assert [line for line in lines if "--optimizer.lr " in line and "Peak learning rate. (default: 0.1)" in line]
    assert "  Which samples, in which order." in lines
    (line,) = [line for line in helped(capsys, "q2") if line.startswith("  --model.layers [INT ...] ")]
    assert line.endswith("(default: (1024, 1000, 500, 256, 128, 64))")


def test_help_shows_the_settings_of_a_file(capsys, tmp_path):
    (tmp_path / "settings.yaml").write_text("optimizer: {lr: 0.025}")
    lines = helped(capsys, "q1", "--config", str(tmp_path / "settings.yaml"), "--epochs", "many")
    assert any(line.endswith("Peak learning rate. (default: 0.025)") for line in lines)


def test_help_on_a_terminal_is_wrapped_and_coloured(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = helped(capsys, "q1")
    assert max(len(re.sub(r"\x1b\[\d*m", "", line)) for line in lines) <= 70
    assert any(line.startswith("  \x1b[36m--optimizer.lr\x1b[0m FLOAT") for line in lines)


@pytest.mark.parametrize("command", ["train", "train q1", "tune", "evaluate", "predict", "report", "verify"])
def test_every_command_tells_its_version(command, monkeypatch, capsys):
    name, *recipe = command.split()
    monkeypatch.setattr(sys, "argv", [name, *recipe, "--version"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"dlops_dist.{name}").main()
    assert stop.value.code in (0, None)
    assert capsys.readouterr().out == "dlops_dist 0.1.0\n"


def test_where_each_setting_comes_from(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("epochs: 7\nseed: 5\nworkers: 4\noptimizer: {lr: 0.02, momentum: 0.5}")
    line = read_command_line("q1", ["--config", str(file), "--smoke", "--optimizer.lr", "0.3", "--data.no-drop-last"])
    expected = {
        "config": "command line", "smoke": "command line", "optimizer.lr": "command line",
        "data.drop_last": "command line", "seed": str(file), "optimizer.momentum": str(file), "local": "--smoke",
        "epochs": "--smoke", "global_batch_size": "--smoke", "data.reader": "--smoke", "model.width": "--smoke",
        "model.stem": "--smoke", "augment.crop_padding": "--smoke",
    }  # fmt: skip
    assert line.origins == expected
    assert not line.dry_run
    assert read_command_line("q1", ["--dry-run"]).dry_run


def test_a_dry_run_is_refused_where_none_is_offered(user_error):
    with user_error("unknown setting --dry-run;"):
        read_settings("q1", ["--dry-run"])


# one process, or several


@pytest.mark.parametrize("flag", ["--local", "--smoke"])
@pytest.mark.parametrize("text", ["workers: 4", "workers: 4\nmin_workers: 2", "min_workers: 2"])
def test_one_process_wins_over_the_workers_of_a_file(flag, text, read):
    settings = read(text, flag)
    assert (settings.local, settings.workers, settings.min_workers) == (True, None, None)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", "--local --workers 4", "workers: 4 processes need Ray; leave out --local"),
        ("", "--local --min-workers 2", "min_workers: 2 processes need Ray; leave out --local"),
        ("", "--smoke --workers 4", "workers: 4 processes need Ray; pass --no-local"),
        ("local: true", "--workers 4", "workers: 4 processes need Ray; pass --no-local"),
        ("local: true\nworkers: 4", "", "workers: 4 processes need Ray; pass --no-local"),
    ],
)
def test_one_process_and_several_are_refused(text, arguments, message, read):
    with pytest.raises(UserError, match=f"^{message}$"):
        read(text, *arguments.split())


def test_smoke_may_run_on_ray(read):
    settings = read("workers: 4", "--smoke", "--no-local", "--workers", "2")
    assert (settings.smoke, settings.local, settings.workers) == (True, False, 2)


# mistakes


@pytest.mark.parametrize(
    ("given", "closest"),
    [
        ("--epoch", "--epochs"),
        ("--optimizer.momentun", "--optimizer.momentum"),
        ("--optimizer.weight_deca", "--optimizer.weight-decay"),
        ("--triplet.margins=1", "--triplet.margin"),
        ("--data.shard", "--data.shards"),
        ("--globalbatchsize", "--global-batch-size"),
        ("--lr", "--optimizer.lr"),
        ("--optimizer.lrr", "--optimizer.lr"),
        ("--optimizer.rl", "--optimizer.lr"),
        ("--lrr", "--optimizer.lr"),
        ("--margin", "--triplet.margin"),
    ],
)
def test_an_unknown_argument_names_the_closest(given, closest, user_error):
    with user_error(f"{given.split('=')[0]};", f"did you mean {closest}?"):
        read_settings("q1", [given, "1"])


@pytest.mark.parametrize(
    ("text", "given", "closest"),
    [
        ("epoch: 3", "epoch", "epochs"),
        ("globl_batch_size: 3", "globl_batch_size", "global_batch_size"),
        ("optimizer: {lrr: 1}", "optimizer.lrr", "optimizer.lr"),
        ("data: {samples_pro_class: 4}", "data.samples_pro_class", "data.samples_per_class"),
        ("lr: 0.1", "lr", "optimizer.lr"),
    ],
)
def test_an_unknown_name_in_a_file_names_the_closest(text, given, closest, read, user_error):
    with user_error(f"unknown setting {given};", f"did you mean {closest}?"):
        read(text)


@pytest.mark.parametrize("name", ["zzzzzz", "banana", "optimizer.banana", "temperature", "gpus", "data.resume"])
def test_a_name_like_none_points_at_the_help(name, read, tmp_path):
    with pytest.raises(UserError, match=f"^unknown setting --{name}; --help lists them all$"):
        read_settings("q1", [f"--{name}", "1"])
    section, _, last = name.rpartition(".")
    with pytest.raises(UserError, match=f"settings.yaml:1: unknown setting {name}; --help lists them all$"):
        read(f"{section}: {{{last}: 1}}" if section else f"{name}: 1")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("epochs", "0", "greater than or equal to 1"),
        ("seed", "-1", "greater than or equal to 0"),
        ("seed", "4294967296", "less than 4294967296"),
        ("workers", "0", "greater than or equal to 1"),
        ("optimizer.lr", "0", "greater than 0"),
        ("optimizer.lr", "nan", "finite"),
        ("optimizer.momentum", "1", "less than 1"),
        ("optimizer.weight_decay", "-0.1", "greater than or equal to 0"),
        ("data.val_fraction", "1.0", "less than 1"),
        ("data.samples_per_class", "1", "greater than or equal to 2"),
        ("data.prefetch", "0", "greater than or equal to 1"),
        ("ce.label_smoothing", "1", "less than 1"),
        ("center.alpha", "0", "greater than 0"),
        ("name", "a/b", "A-Za-z0-9"),
        ("name", "../a", "A-Za-z0-9"),
    ],
)
@pytest.mark.parametrize("where", ["line", "file"])
def test_a_value_out_of_range_names_field_value_and_what_is_allowed(*, where, name, value, allowed, read, user_error):
    shown = value.removesuffix(".0")
    with user_error(f"{name}:", shown, allowed):
        if where == "line":
            read_settings("q1", [f"--{name}", value])
        else:
            section, _, last = name.rpartition(".")
            pair = f"{last}: {value.replace('nan', '.nan')}"
            read(f"{section}: {{{pair}}}" if section else pair)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--epochs", "ten"], ["epochs: 'ten'", "integer"]),
        (["--epochs", "1.5"], ["epochs: '1.5'", "integer"]),
        (["--workers", "many"], ["workers: 'many'", "integer"]),
        (["--optimizer.lr", "fast"], ["optimizer.lr: 'fast'", "number"]),
        (["--compile", "maybe"], ["--compile", "'maybe'", "True", "False"]),
        (["--loss", "hinge"], ["loss: 'hinge'", "'ce'", "'triplet'", "'center'"]),
        (["--model.norm", "batch"], ["model.norm: 'batch'", "'sync'", "'local'"]),
        (["--triplet.mining", "semi"], ["triplet.mining: 'semi'", "'batch-hard'", "'semi-hard'", "'all'"]),
        (["--epochs"], ["--epochs", "expected one argument"]),
        (["--epochs", "--loss", "ce"], ["--epochs", "expected one argument"]),
        (["--config"], ["--config", "argument"]),
        (["--name"], ["--name", "expected one argument"]),
        (["--smoke=1"], ["--smoke", "1"]),
        (["triplet"], ["triplet"]),
    ],
    ids=" ".join,
)
def test_an_argument_that_cannot_be_read_is_explained(arguments, shown, user_error, capfd):
    with user_error(*shown):
        read_settings("q1", arguments)
    assert capfd.readouterr() == ("", "")  # nothing besides the error's one line


@pytest.mark.parametrize("columns", ["30", "80", "300"])
def test_a_long_value_is_shown_whole_on_any_terminal(columns, monkeypatch, user_error):
    value = "a/folder/of/which/nobody/would/think/that/it/could/be/meant/as/the/name/of/a/loss/and/so/on"
    monkeypatch.setenv("COLUMNS", columns)
    with user_error(f"'{value}'", "'semi-hard'"):
        read_settings("q1", ["--triplet.mining", value])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("epochs: ten", ["epochs:", "'ten'", "integer"]),
        ("epochs: 1.5", ["epochs:", "1.5", "integer"]),
        ("epochs: [1, 2]", ["epochs:", "[1, 2]", "integer"]),
        ("data: {shards: 3}", ["data.shards:", "3", "string"]),
        ("data:", ["data:", "None", "dictionary"]),
        ("optimizer: 0.1", ["optimizer:", "0.1", "dictionary"]),
        ("loss: hinge", ["loss:", "'hinge'", "'ce', 'triplet' or 'center'"]),
        ("optimizer: {schedule: cos}", ["optimizer.schedule:", "'cos'", "'cosine'"]),
        ('name: "a\\nb"', ["name:", "a\\nb", "A-Za-z0-9"]),
        ("1: 2", ["1"]),
        ("on: 3", ["on"]),
        ("optimizer: {1: 2}", ["1"]),
    ],
    ids=repr,
)
def test_a_wrong_value_in_a_file_is_explained(text, shown, read, user_error):
    with user_error(*shown):
        read(text)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("# ours\nepochs: 3\noptimizer:\n  lr: -1\n", "", "4: optimizer.lr: -1 should be greater than 0"),
        ("epochs: 3\noptimizer:\n  lrr: 1\n", "", "3: unknown setting optimizer.lrr; did you mean optimizer.lr?"),
        ("epochs: 3\n\nbanana: 3\n", "", "3: unknown setting banana; --help lists them all"),
        ("seed: 0\noptimizer: 3", "", "2: optimizer: 3 should be a valid dictionary or instance of Optimizer"),
        ("seed: 0\noptimizer: {nesterov: true,\n momentum: 0}", "", "2: optimizer.nesterov needs momentum > 0"),
        ("epochs: 3\nseed: -1", "--epochs 4", "2: seed: -1 should be greater than or equal to 0"),
        ("epochs: 1\nepochs: -3", "", "2: epochs: -3 should be greater than or equal to 1"),
        ("base: &a {lr: 1}\noptimizer:\n  <<: *a\n  lr: -2", "", "4: optimizer.lr: -2 should be greater than 0"),
        ("a: [1,\n2\nb: 3", "", "3: not valid YAML: while parsing a flow sequence, expected ',' or ']'"),
        ("epochs: 3\n\tseed: 1", "", "2: not valid YAML: while scanning for the next token, found character '\\t'"),
        ("epochs: 3\ndata: {1: 2}", "", "2: '1' is not the name of a setting"),
        ("# no\n- epochs", "", "2: must hold settings as 'name: value'"),
    ],
)
def test_a_mistake_in_a_file_names_its_line(text, arguments, message, read, tmp_path):
    with pytest.raises(UserError) as caught:
        read(text, *arguments.split())
    assert str(caught.value).startswith(f"{tmp_path / 'settings.yaml'}:{message}")


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("epochs: 3", "--epochs 0", "epochs: '0' should be"),
        ("optimizer: {nesterov: true}", "--optimizer.momentum 0", "optimizer.nesterov needs momentum > 0"),
        ("optimizer: {lr: 3}", "--optimizer.momentum 2", "optimizer.momentum: '2' should be less than 1"),
    ],
)
def test_a_mistake_on_the_command_line_names_no_file(text, arguments, message, read):
    with pytest.raises(UserError) as caught:
        read(text, *arguments.split())
    assert str(caught.value).startswith(message)


def test_a_mistake_is_told_by_one_process_to_another():
    with pytest.raises(UserError) as caught:
        Q1(optimizer={"lr": 0})
    told = pickle.loads(pickle.dumps(caught.value))
    assert (str(told), told.place) == ("optimizer.lr: 0 should be greater than 0", ("optimizer", "lr"))


def test_a_mistake_in_a_file_that_the_command_line_mends_is_none(read):
    assert read("epochs: many", "--epochs", "3").epochs == 3


@pytest.mark.parametrize(
    "content",
    [
        b"a: [", b"a: b: c", b"epochs: 3\n\tseed: 1", b"'open", b"\xff\xfe\xfa", b"- epochs\n- 3", b"epochs",
        b"&a [*b]", b"a: &a {b: *a}", b"epochs: 2024-13-45", b"[" * 5000,
    ],
    ids=lambda content: repr(content[:20]),
)  # fmt: skip
def test_a_file_that_is_no_mapping_is_named(content, tmp_path, user_error):
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    with user_error(path):
        read_settings("q1", ["--config", str(path)])


@pytest.mark.parametrize("name", ["missing.yaml", "folder/missing.yaml", "."])
def test_a_config_that_is_not_there_is_named(name, tmp_path, monkeypatch, user_error):
    monkeypatch.chdir(tmp_path)
    with user_error(name):
        read_settings("q1", ["--config", name])


@pytest.mark.parametrize("other", [["--optimizer.momentum", "0"], ["--optimizer.dampening", "0.1"]])
def test_nesterov_without_momentum_names_the_three_settings(other, user_error):
    with user_error("optimizer.nesterov", "momentum > 0", "dampening 0"):
        read_settings("q1", ["--optimizer.nesterov", *other])


# what identifies a run

MAY_DIFFER = {
    "max_restarts": 0, "node_wait": 60, "collective_timeout": 60,
    "config": "other.yaml", "name": "other", "runs_dir": "elsewhere", "local": True, "smoke": True, "workers": 7,
    "wandb": "offline", "tensorboard": True, "log_every": 7, "min_workers": 1, "inexact": True,
    "checkpoint_every": 5, "keep_checkpoints": 3,
    "data.shards": "elsewhere", "data.threads": 9, "data.prefetch": 9,
    "data.reader": "decode", "data.cache_dir": "elsewhere",
}  # fmt: skip
CHANGES_THE_RESULT = {
    "epochs": 11, "global_batch_size": 64, "micro_batch_size": 32, "seed": 1, "precision": "float64", "ema_decay": 0.9,
    "flip_test": True, "init_from": "elsewhere", "freeze": ("conv1",), "choose_by": "val/loss", "patience": 3,
    "compile": True, "deterministic": False, "loss": "center",
    "exactness": "rounding", "blocks": 2, "threads_per_block": 2,
    "data.order": "balanced", "data.samples_per_class": 8, "data.drop_last": False, "data.val_fraction": 0.1,
    "data.small_classes": "repeat",
    "augment.crop_padding": 1, "augment.flip": False, "augment.resized_crop": 0.5, "augment.brightness": 0.1,
    "augment.contrast": 0.1, "augment.saturation": 0.1, "augment.cutout": 8,
    "augment.mixup": 0.2, "augment.cutmix": 1.0,
    "model.stem": "imagenet", "model.width": 32, "model.norm": "local",
    "optimizer.lr": 0.2, "optimizer.momentum": 0.8, "optimizer.dampening": 0.5, "optimizer.nesterov": True,
    "optimizer.weight_decay": 0.0, "optimizer.clip_norm": 1.0, "optimizer.schedule": "step",
    "optimizer.warmup_epochs": 0.0, "optimizer.step_epochs": 10, "optimizer.step_gamma": 0.5,
    "ce.label_smoothing": 0.1,
    "triplet.margin": 0.3, "triplet.mining": "all", "triplet.normalize": False, "triplet.squared": True,
    "triplet.average": "active", "triplet.ce_weight": 1.0,
    "center.weight": 0.1, "center.alpha": 0.1, "center.ce_weight": 0.0,
}  # fmt: skip


def with_setting(name: str, value: object) -> Q1:
    *sections, last = name.split(".")
    return Q1(**({sections[0]: {last: value}} if sections else {last: value}))


def test_every_setting_is_listed_as_changing_the_result_or_not():
    defaults, others = flat(Q1().model_dump()), MAY_DIFFER | CHANGES_THE_RESULT
    assert defaults.keys() == others.keys()
    assert [name for name in defaults if defaults[name] == others[name]] == []
    assert result_settings(Q1()).keys() | LATER.keys() == CHANGES_THE_RESULT.keys()
    assert {name: value for name, value in defaults.items() if name in LATER} == LATER


@pytest.mark.parametrize("name", MAY_DIFFER)
def test_the_default_name_does_not_depend_on(name):
    assert default_name("q1", with_setting(name, MAY_DIFFER[name]), "id") == default_name("q1", Q1(), "id")


def test_the_default_name_depends_on_each_setting_that_changes_the_result():
    names = [default_name("q1", with_setting(name, value), "id") for name, value in CHANGES_THE_RESULT.items()]
    names += [default_name("q1", Q1(), "id"), default_name("q1", Q1(), "other id"), default_name("q2", Q1(), "id")]
    assert len(set(names)) == len(names)
    assert all(Q1(name=name).name == name for name in names)  # each is a name that --name would take


def test_the_default_name_is_made_of_task_loss_and_hash():
    task, loss, digest = default_name("q1", Q1(loss="triplet"), "id").split("-")
    assert (task, loss) == ("q1", "triplet")
    assert int(digest, 16) >= 0


@pytest.mark.parametrize("name", MAY_DIFFER | CHANGES_THE_RESULT)
def test_the_settings_of_a_run_are_read_back_as_they_were(name, tmp_path):
    settings = with_setting(name, (MAY_DIFFER | CHANGES_THE_RESULT)[name])
    RunFolder(tmp_path / "run").create("q1", settings)
    assert RunFolder(tmp_path / "run").settings() == ("q1", settings)


def test_the_config_of_a_run_can_be_given_as_config(tmp_path):
    settings = read_settings("q1", ["--loss", "center", "--epochs", "3", "--optimizer.lr", "0.025"])
    RunFolder(tmp_path / "run").create("q1", settings)
    again = read_settings("q1", ["--config", str(tmp_path / "run" / "config.yaml")])
    assert result_settings(again) == result_settings(settings)


# exit codes


def raiser(error: BaseException):
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("epochs: 0"), 2, "error: epochs: 0\n"),
        (RunError("loss is nan"), 1, "failed: loss is nan\n"),
    ],
)
def test_a_known_error_is_one_line_and_its_exit_code(error, code, line, capsys):
    assert exit_code_of(raiser(error)) == code
    assert capsys.readouterr() == ("", line)


def test_ctrl_c_is_130_and_one_line(capsys):
    assert exit_code_of(raiser(KeyboardInterrupt())) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1


def test_a_command_that_ends_well_is_0_and_prints_nothing(capsys):
    assert exit_code_of(lambda: None) == 0
    assert capsys.readouterr() == ("", "")


def test_an_unknown_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code_of(raiser(ZeroDivisionError()))
