"""``trainstep replay``: exact runs are reproduced, a planted difference is found, nothing is written."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer import digest_log

NOISY = ("--", "--out", "b", "--noise", "5")


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_exact_run_is_reproduced_and_nothing_is_written(
    runs: Path, trainstep: Callable[..., Any]
) -> None:
    before = tree(runs)
    outcome = trainstep("replay", "a/checkpoint-4", "--script", "train.py", "--", "--out", "a")
    assert outcome.status == 0
    assert outcome.out.splitlines() == [
        "replayed a/checkpoint-4 to step 8, of which 4 steps were recorded",
        "reproduced: the same bits",
    ]
    assert tree(runs) == before


def test_noise_is_found_at_its_step(runs: Path, trainstep: Callable[..., Any]) -> None:
    outcome = trainstep("replay", "b/checkpoint-4", "--script", "train.py", "--json", *NOISY)
    assert outcome.status == 1
    data = outcome.data
    assert data["reproduced"] is False
    assert (data["last_equal"], data["first_different"]) == (4, 5)
    assert data["parts"] == ["params"]
    assert data["loss"]["recorded"] == data["loss"]["replayed"] is not None
    text = trainstep("replay", "b/checkpoint-4", "--script", "train.py", *NOISY).out
    assert "first difference: step 5; step 4 is equal\n" in text


def test_later_checkpoints_are_enough_to_compare_with(
    runs: Path, trainstep: Callable[..., Any]
) -> None:
    Path("b/digests.jsonl").unlink()
    outcome = trainstep("replay", "b/checkpoint-4", "--script", "train.py", "--json", *NOISY)
    assert outcome.status == 1
    assert outcome.data["compared"] == [8]
    assert (outcome.data["last_equal"], outcome.data["first_different"]) == (4, 8)
    assert {"params/body.2.bias"} < {leaf["path"] for leaf in outcome.data["leaves"]}
    text = trainstep("replay", "b/checkpoint-4", "--script", "train.py", *NOISY).out
    assert "it arose in one of the steps 5 to 8" in text
    assert "and 2 more" in text

    Path("a/digests.jsonl").unlink()
    assert trainstep("replay", "a/checkpoint-4", "--script", "train.py").status == 0


def test_the_number_of_steps(runs: Path, trainstep: Callable[..., Any]) -> None:
    command = ("replay", "b/checkpoint-4", "--script", "train.py", "--json", "--steps")
    data = trainstep(*command, 2, *NOISY).data
    assert (data["last_step"], data["compared"]) == (6, [5, 6])
    assert data["first_different"] == 5
    # More than the training has: it ends by itself.
    data = trainstep(*command, 100, *NOISY).data
    assert (data["last_step"], data["compared"]) == (8, [5, 6, 7, 8])


def test_arguments_that_are_not_those_of_the_run_are_listed(
    runs: Path, trainstep: Callable[..., Any]
) -> None:
    text = Path("train.py").read_text()
    Path("other.py").write_text(text.replace("learning_rate=0.1", "learning_rate=0.2"))
    outcome = trainstep("replay", "a/checkpoint-4", "--script", "other.py")
    assert outcome.status == 1
    assert "  learning_rate: 0.1 != 0.2" in outcome.out
    data = trainstep("replay", "a/checkpoint-4", "--script", "other.py", "--json").data
    assert data["arguments"] == {"learning_rate": [0.1, 0.2]}
    assert data["first_different"] == 5


def test_the_log_of_a_replay_is_that_of_the_run(runs: Path, trainstep: Callable[..., Any]) -> None:
    trainstep("replay", "a/checkpoint-4", "--script", "train.py", "--log", "again.jsonl")
    recorded = digest_log.read(Path("a/digests.jsonl"))
    again = digest_log.read(Path("again.jsonl"))
    assert list(again) == [4, 5, 6, 7, 8]
    assert all(again[step] == recorded[step] for step in (5, 6, 7, 8))
    assert again[4]["digest"] == recorded[4]["digest"]


def test_a_run_recorded_elsewhere(runs: Path, trainstep: Callable[..., Any]) -> None:
    Path("a/checkpoint-4").rename("moved")
    command = ("replay", "moved", "--script", "train.py", "--run")
    assert trainstep(*command, "a").status == 0
    assert trainstep(*command, "a/digests.jsonl").status == 0
    assert trainstep(*command, "b").status == 1


def test_nothing_is_evaluated_unless_asked_for(runs: Path, trainstep: Callable[..., Any]) -> None:
    text = Path("train.py").read_text()
    text = text.replace("max_steps=8,", 'max_steps=8, eval_strategy="steps", eval_steps=2,')
    text = text.replace("trainer = Trainer(", "trainer = Watched(")
    text = text.replace("train_dataset=data,", "train_dataset=data, eval_dataset=data,")
    watched = """class Watched(Trainer):
    def evaluate(self, *args, **kwargs):
        print("evaluating")
        return super().evaluate(*args, **kwargs)


parser = """
    Path("eval.py").write_text(text.replace("parser = ", watched, 1))
    command = ("replay", "a/checkpoint-4", "--script", "eval.py")
    outcome = trainstep(*command)
    assert outcome.status == 0
    assert "evaluating" not in outcome.err
    outcome = trainstep(*command, "--evaluate")
    assert outcome.status == 0
    assert outcome.err.count("evaluating") == 1  # at step 6; at 8 the replay is over
    assert "evaluating" not in outcome.out


def test_a_schedule_that_follows_a_metric_is_replayed_with_its_evaluations(
    runs: Path, trainstep: Callable[..., Any], run_training: Callable[..., None]
) -> None:
    text = Path("train.py").read_text()
    more = (
        'max_steps=8, eval_strategy="steps", eval_steps=1, metric_for_best_model="loss", '
        'lr_scheduler_type="reduce_lr_on_plateau", '
        'lr_scheduler_kwargs={"patience": 0, "threshold": 10.0, "threshold_mode": "abs"},'
    )
    text = text.replace("max_steps=8,", more)
    text = text.replace("train_dataset=data,", "train_dataset=data, eval_dataset=data,")
    Path("plateau.py").write_text(text)
    run_training(Path("plateau.py"), "--out", "p")
    outcome = trainstep("replay", "p/checkpoint-4", "--script", "plateau.py", "--json")
    assert outcome.status == 0
    assert outcome.data["evaluated"] is True


def test_nothing_is_saved_whoever_asks_for_it(
    runs: Path, trainstep: Callable[..., Any], run_training: Callable[..., None]
) -> None:
    text = Path("train.py").read_text()
    more = "max_steps=8, eval_strategy='steps', eval_steps=4, load_best_model_at_end=True,"
    text = text.replace("max_steps=8,", more)
    text = text.replace("train_dataset=data,", "train_dataset=data, eval_dataset=data,")
    saving = """class Saving(Noise):
    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save = True

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        print("saved", state.global_step)


parser = """
    text = text.replace("parser = ", saving, 1).replace("[Noise(", "[Saving(")
    Path("saving.py").write_text(text)
    run_training(Path("saving.py"), "--out", "s")
    for more in ((), ("--evaluate",)):
        outcome = trainstep("replay", "s/checkpoint-2", "--script", "saving.py", *more)
        assert outcome.status == 0, outcome
        assert "saved" not in outcome.err


def test_the_best_is_not_saved_either(runs: Path, trainstep: Callable[..., Any]) -> None:
    text = Path("train.py").read_text()
    more = "max_steps=8, eval_strategy='steps', eval_steps=2, metric_for_best_model='loss',"
    text = text.replace("max_steps=8,", f"{more} load_best_model_at_end=True,")
    text = text.replace("save_steps=4,", "save_steps=2,")
    text = text.replace("train_dataset=data,", "train_dataset=data, eval_dataset=data,")
    text = text.replace(
        "    def on_step_end",
        "    def on_save(self, *arguments, **kwargs):\n"
        "        print('saved')\n\n    def on_step_end",
    )
    Path("best.py").write_text(text)
    outcome = trainstep("replay", "a/checkpoint-4", "--script", "best.py", "--evaluate")
    assert outcome.status == 0
    assert "'eval_loss'" in outcome.err
    assert "saved" not in outcome.err


@pytest.mark.parametrize("caught", ["Exception", "BaseException"])
def test_the_first_training_of_a_script_ends_it(
    caught: str, runs: Path, trainstep: Callable[..., Any]
) -> None:
    text = Path("train.py").read_text()
    begun = "    def on_train_begin(self, *arguments, **kwargs):\n        print('begun')\n\n"
    text = text.replace("    def on_step_end", f"{begun}    def on_step_end")
    more = f"try:\n    trainer.train()\nexcept {caught}:\n    print('caught')\ntrainer.train()\n"
    Path("again.py").write_text(text.replace("trainer.train()\n", more))
    outcome = trainstep("replay", "a/checkpoint-4", "--script", "again.py")
    assert outcome.status == 0
    assert outcome.err.count("begun") == 1
    assert ("caught" in outcome.err) is (caught == "BaseException")


def test_a_training_in_a_thread_of_the_script(runs: Path, trainstep: Callable[..., Any]) -> None:
    text = Path("train.py").read_text()
    body = (
        "def run():\n    try:\n        trainer.train()\n    except BaseException:\n        pass\n"
    )
    thread = "import threading\nt = threading.Thread(target=run)\nt.start()\nt.join()\n"
    Path("thread.py").write_text(text.replace("trainer.train()\n", body + thread))
    assert trainstep("replay", "a/checkpoint-4", "--script", "thread.py").status == 0


def test_the_script_finds_its_neighbours_and_its_arguments(
    runs: Path, trainstep: Callable[..., Any]
) -> None:
    Path("scripts").mkdir()
    text = Path("train.py").read_text()
    Path("scripts/neighbour.py").write_text("answer = 42\n")
    check = "import sys\nfrom neighbour import answer\nassert sys.argv[1:] == ['--out', 'a']\n"
    Path("scripts/train.py").write_text(check + text)
    command = ("replay", "a/checkpoint-4", "--script", "scripts/train.py", "--", "--out", "a")
    assert trainstep(*command).status == 0


def test_scripts_that_fail_or_do_not_train(runs: Path, refused: Callable[..., str]) -> None:
    command = ("replay", "a/checkpoint-4", "--script")
    assert "nope.py: no such script" in refused(*command, "nope.py")
    Path("idle.py").write_text("x = 1\n")
    assert "idle.py: it ended without a call of Trainer.train()" in refused(*command, "idle.py")
    Path("exits.py").write_text("import sys\nsys.exit(3)\n")
    assert "exits.py: it exited with 3 without a call" in refused(*command, "exits.py")
    Path("fails.py").write_text("x = 1\nraise ValueError('two\\nlines')\n")
    assert "fails.py:2: ValueError: two lines" in refused(*command, "fails.py")
    text = Path("train.py").read_text().replace("nn.Linear(4, 8)", "nn.Linear(4, 9)")
    Path("wider.py").write_text(text.replace("nn.Linear(8, 1)", "nn.Linear(9, 1)"))
    message = refused(*command, "wider.py")
    assert re.search(r"wider\.py:\d+: ValueError: .*params/body\.0\.weight", message)


def test_nothing_recorded_to_compare_with(
    runs: Path, write_checkpoint: Callable[..., Path], refused: Callable[..., str]
) -> None:
    script = ("--script", "train.py")
    assert "no digest after step 8 was recorded" in refused("replay", "a/checkpoint-8", *script)
    Path("a/digests.jsonl").unlink()
    message = refused("replay", "a/checkpoint-4", *script, "--steps", 2)
    assert "the first step recorded after the checkpoint's 4 is 8; use --steps 4 or more" in message
    only = write_checkpoint(runs / "only", {}, state=None)
    assert "as it has no digest: saved with save_only_model" in refused("replay", only, *script)
    Path("b/digests.jsonl").write_text(json.dumps({"step": "x"}) + "\n")
    assert "digests.jsonl, line 1: not an entry" in refused("replay", "b/checkpoint-4", *script)


@pytest.mark.parametrize("step", [5, 8])
def test_a_line_that_was_tampered_with_is_noticed(
    step: int, runs: Path, trainstep: Callable[..., Any]
) -> None:
    log = Path("a/digests.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[step]["digest"] = "0" * 64
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = trainstep("replay", "a/checkpoint-4", "--script", "train.py", "--json")
    assert outcome.status == 1
    assert outcome.data["first_different"] == step
