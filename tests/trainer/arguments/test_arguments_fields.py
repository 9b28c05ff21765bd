"""Fields: names, defaults, helps; the Hugging Face arguments as a peer."""

import dataclasses
import enum
import importlib.metadata
import subprocess
import sys

import pytest

from trainer.arguments import AcceleratorConfig, Seq2SeqTrainingArguments, TrainingArguments

OURS = {
    "capture": "auto",
    "exact_reduction": False,
    "on_nonfinite": "ignore",
    "async_save": False,
    "checkpoint_format": "safe",
    "log_digest_steps": 0,
    "log_figures": False,
    "peak_tflops": None,
}


def plain(value):
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, list):
        return [plain(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


@pytest.fixture(scope="module")
def peer():
    transformers = pytest.importorskip("transformers")
    if importlib.metadata.version("transformers") != "5.6.1":
        pytest.skip("the fields were read from version 5.6.1")
    return transformers


def test_number_of_fields():
    names = [field.name for field in dataclasses.fields(TrainingArguments)]
    assert len(set(names)) == len(names) == 112 + len(OURS)
    assert len(dataclasses.fields(Seq2SeqTrainingArguments)) == 117 + len(OURS)


def test_extensions_and_their_defaults():
    args = TrainingArguments()
    assert {name: getattr(args, name) for name in OURS} == OURS


@pytest.mark.row(28)
@pytest.mark.parametrize("name", ["TrainingArguments", "Seq2SeqTrainingArguments"])
def test_names_and_declared_defaults_are_those_of_the_peer(peer, name):
    theirs = {field.name: field for field in dataclasses.fields(getattr(peer, name))}
    ours = {field.name: field for field in dataclasses.fields(globals()[name])}
    assert set(ours) - set(theirs) == set(OURS)
    assert set(theirs) <= set(ours)
    for key, field in theirs.items():
        assert plain(ours[key].default) == plain(field.default), key


@pytest.mark.row(75)
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"use_cpu": True},
        {"eval_strategy": "steps", "logging_steps": 10.0, "save_steps": 20.0},
        {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True},
        {"metric_for_best_model": "accuracy", "report_to": "tensorboard"},
        {"torch_compile_mode": "default", "use_cpu": True},
        {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_min_num_params": 5}},
        {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "Block"}},
        {"include_num_input_tokens_seen": True, "debug": "underflow_overflow"},
        {"lr_scheduler_kwargs": '{"a": "true", "b": {"c": "3"}}', "output_dir": "~/runs/"},
        {"accelerator_config": {"split_batches": True}, "lr_scheduler_type": "cosine"},
        {"save_steps": 0, "warmup_steps": 0.25, "logging_steps": 0.1},
    ],
    ids=str,
)
def test_values_after_construction_are_those_of_the_peer(peer, given):
    theirs = peer.TrainingArguments(**given)
    ours = TrainingArguments(**given)
    for field in dataclasses.fields(theirs):
        value, expected = getattr(ours, field.name), getattr(theirs, field.name)
        assert plain(value) == plain(expected), field.name


def test_output_dir_is_the_first_positional():
    assert TrainingArguments("runs", 4).output_dir == "runs"
    assert TrainingArguments("runs", 4).per_device_train_batch_size == 4


def test_default_output_dir():
    assert TrainingArguments().output_dir == "trainer_output"


@pytest.mark.parametrize(
    "field", dataclasses.fields(Seq2SeqTrainingArguments), ids=lambda f: f.name
)
def test_every_field_has_a_help_that_argparse_can_format(field):
    help_text = field.metadata["help"]
    assert help_text.endswith(".")
    assert "%" not in help_text


def test_subclass_adds_a_field_and_changes_a_default():
    @dataclasses.dataclass
    class Mine(TrainingArguments):
        learning_rate: float = 1e-3
        temperature: float = dataclasses.field(default=2.0, metadata={"help": "Softness."})

    args = Mine("out", temperature=3.0, eval_strategy="epoch")
    assert (args.learning_rate, args.temperature, args.do_eval) == (1e-3, 3.0, True)
    assert Mine(**args.to_dict()) == args


def test_assignment_stays_allowed_and_normalize_checks_it():
    args = TrainingArguments()
    args.max_steps = 3
    args.train_sampling_strategy = "alphabetical"
    assert args.max_steps == 3
    with pytest.raises(ValueError, match="'random', 'sequential', 'group_by_length'"):
        args.normalize()


def test_construction_does_not_change_what_it_is_given():
    config, kwargs = {"fsdp_version": 2}, {"num_cycles": 2}
    args = TrainingArguments(fsdp_config=config, lr_scheduler_kwargs=kwargs)
    args.lr_scheduler_kwargs["num_cycles"] = 3
    assert config == {"fsdp_version": 2}
    assert kwargs == {"num_cycles": 2}


def test_accelerator_config_of_another_library_is_read(peer):
    from transformers.trainer_pt_utils import AcceleratorConfig as Theirs

    config = TrainingArguments(accelerator_config=Theirs(split_batches=True)).accelerator_config
    assert config == AcceleratorConfig(split_batches=True)


QUIET_CONSTRUCTION = """
import logging, os, sys
events = []
def watch(event, arguments):
    written = event == "open" and any(mode in str(arguments[1]) for mode in "wax+")
    if written or event in ("os.mkdir", "os.putenv", "os.unsetenv", "subprocess.Popen") \
            or event.startswith("socket"):
        events.append((event, arguments))
from trainer.arguments import HfArgumentParser, Seq2SeqTrainingArguments
sys.addaudithook(watch)
args = Seq2SeqTrainingArguments(
    "somewhere", bf16=True, tf32=True, torch_compile=True, eval_strategy="steps", report_to="all",
    fsdp="full_shard", deepspeed={"a": 1}, accelerator_config={"even_batches": False}, ddp_backend="gloo",
)
args.set_training().set_logging(report_to=None)
HfArgumentParser(Seq2SeqTrainingArguments).parse_args_into_dataclasses(["--seed", "1"])
heavy = {"torch", "accelerate", "transformers", "yaml", "numpy"} & set(sys.modules)
assert not heavy, heavy
assert not events, events
"""


def test_construction_loads_no_torch_and_touches_nothing(tmp_path):
    environment = {"PYTHONPATH": ":".join(sys.path), "RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-B", "-c", QUIET_CONSTRUCTION],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
