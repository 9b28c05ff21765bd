"""``Trainer.train``: set up a run, go through it, wind it up."""

import copy
import json
import logging
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import trainstep as ts
from trainer import digest_log, distributed, modeling, saving
from trainer.batch_size import find_executable_batch_size, is_out_of_memory, remember
from trainer.callbacks import TrainerState
from trainer.checkpoint import Loaded
from trainer.clipping import Clipping
from trainer.data.feed import Feed
from trainer.data.prefetch import Prefetch
from trainer.distributed import agree
from trainer.engine import no_loss
from trainer.figures import Figures
from trainer.interrupt import Asked, Interruption
from trainer.loop import Event, Run, events
from trainer.lowering import engage, recorded
from trainer.memory import Stage
from trainer.meter import Meter
from trainer.metrics import speed_metrics
from trainer.optimization import make_transforms
from trainer.optimizers import Rates
from trainer.outputs import TrainOutput
from trainer.plan import Plan
from trainer.preparation import counted
from trainer.reactions import Reactions, write_checkpoint
from trainer.records import Records

logger = logging.getLogger(__name__)


def start(trainer: Any, found: Loaded | None, ignore_keys: list[str] | None) -> TrainOutput:
    """Train, with ``auto_find_batch_size`` in the largest batches that fit; see ``Trainer.train``."""
    if trainer._zero is None:
        trainer._renew_optimizer()
    if not trainer.args.auto_find_batch_size:
        trainer._train_batch_size = trainer.args.train_batch_size
        return train(trainer, found, ignore_keys)
    first = trainer.args.train_batch_size
    if found is not None:  # what fitted before
        first = json.loads(found.trainer_state).get("train_batch_size") or first
    kept = trainer._train_state.opt_state if trainer._train_state else ()
    before = copy.deepcopy(trainer.optimizer.state_dict()) if trainer.optimizer else None

    def attempt(size: int) -> TrainOutput:
        trainer._run = trainer._records = None
        trainer._train_batch_size = size
        if before is None:
            trainer.optimizer = trainer._adopted = None
        elif trainer.optimizer is not None:
            # Loading shares the tensors, which the attempt then changes.
            trainer.optimizer.load_state_dict(copy.deepcopy(before))
        if trainer._own_scheduler:
            trainer.lr_scheduler = None
        try:
            return train(trainer, found, ignore_keys)
        except Exception as error:
            if is_out_of_memory(error) and trainer._run is not None:
                trainer._run.close()  # the next attempt needs the memory of its graphs
                trainer._run = trainer._records = None
            raise

    return find_executable_batch_size(
        attempt,
        first,
        snapshot=lambda: remember(trainer.model, kept),
        device=trainer.args.device,
    )


def train(trainer: Any, found: Loaded | None, ignore_keys: list[str] | None) -> TrainOutput:
    """Run one training, with the batch size that is set."""
    with distributed.reported(trainer._ranks):
        return _train(trainer, found, ignore_keys)


def _train(trainer: Any, found: Loaded | None, ignore_keys: list[str] | None) -> TrainOutput:
    ranks = trainer._ranks
    distributed.begin(trainer, ranks)
    loader = trainer.get_train_dataloader()
    plan = Plan.from_values(*trainer.set_initial_training_values(trainer.args, loader))
    plan = distributed.same_plan(plan, ranks)
    run = _set_up(trainer, plan, loader)
    trainer.current_flos = 0.0
    memory = trainer._memory.start("train")
    meter = Meter(trainer.args.logging_nan_inf_filter)
    if distributed.sums_losses_later(trainer.args, ranks):
        meter.join = trainer._share_counts
    trainer._run, trainer._meter = run, meter
    signals = trainer._interruption = Interruption(
        trainer.args.enable_jit_checkpoint, lambda asked: agree.any_of(ranks, [asked])[0]
    )
    run.whole = signals.whole
    if found is not None:
        saving.restore(trainer, run, meter, found)
    trainer._tokens_before = trainer._tokens.total = trainer.state.num_input_tokens_seen
    trainer._tokens_shared = trainer._tokens_before
    first_step = run.state.step
    trainer._digests = digest_log.begin(trainer, resumed=found is not None)
    if trainer._figures is not None:
        trainer._figures.start()
    _announce(trainer, plan, run)
    meter.started = time.time()
    trainer._steering = distributed.Steering(trainer.callback_handler.callbacks, ranks)
    trainer._records = Records(trainer, run, meter, late=recorded(run))
    # Processes need not have equally many evaluation batches: they cannot all leave at one of them.
    leaving = nullcontext() if ranks.many else signals.breaking_off(trainer)
    with signals, leaving, trainer._updating(run):
        try:
            with trainer._records:
                react = Reactions(trainer, run, meter, ignore_keys)
                for event in events(run):
                    react(event)
        except Exception as error:
            if not isinstance(error, Asked) and (ranks.many or not signals.excuses(error)):
                raise
            signals.leave(trainer, run, lambda: write_checkpoint(trainer))
    return _wind_up(trainer, run, meter, run.state.step - first_step, memory)


def _set_up(trainer: Any, plan: Plan, loader: Any) -> Run:
    args = trainer.args
    trainer.model.train()
    trainer.state = TrainerState(
        train_batch_size=trainer._train_batch_size,
        stateful_callbacks=trainer._exported_callbacks(),
    )
    trainer.state.compute_steps(args, plan.max_steps)
    trainer.state.init_training_references(trainer, plan.max_steps, plan.num_train_epochs, None)
    step, state, trainer._rates = _begin(trainer, plan)
    trainer._writer = trainer._make_writer()
    trainer.model_wrapped = trainer._wrap_model(trainer.model)
    handler = trainer.callback_handler
    handler.model, handler.train_dataloader = trainer.model, loader
    handler.optimizer, handler.lr_scheduler = trainer.optimizer, trainer.lr_scheduler
    trainer._figures = Figures(trainer) if args.log_figures else None
    observe = partial(counted, trainer)
    if trainer._figures is not None:
        observe = trainer._figures.watching(observe)
    windows = distributed.Windows(trainer, loader, trainer._ranks, in_tree=args.exact_reduction)
    engine = distributed.make_engine(trainer, state, windows, trainer._ranks)
    run = Run(
        plan=plan,
        step=step,
        state=state,
        engine=engine,
        batches=Feed(loader, observe, progress=not args.disable_tqdm),
        take=windows,
        control=trainer.control,
        accumulation=args.gradient_accumulation_steps,
        ahead=Prefetch(args.device, pin=args.dataloader_pin_memory),
    )
    if trainer._zero is None:
        engage(trainer, run, engine)
        run.refresh = Clipping(trainer, run)
    if trainer._adopted is not None and trainer._adopted.fused is None:
        run.watched = partial(handler.listens, Event.PRE_OPTIMIZER_STEP.value)
    return run


def _begin(trainer: Any, plan: Plan) -> tuple[Any, ts.TrainState, Rates]:
    """Return the update of a run, the state before it, and the rates of its groups."""
    args = trainer.args
    if trainer._zero is not None:
        from trainer.distributed import deepspeed_engine

        return deepspeed_engine.begin(trainer, plan.max_steps)
    trainer._create_missing(plan.max_steps)
    adopted = trainer._adopt_optimizer()
    named = modeling.unwrap(trainer.model).named_parameters
    rates = Rates(trainer.optimizer, trainer.lr_scheduler, adopted.options, named)
    rates.check()
    step = ts.make_step(
        no_loss,
        adopted.pure,
        schedule=rates.at,
        transforms=make_transforms(args),
        on_nonfinite=args.on_nonfinite,
        loss_scale=ts.DynamicScale() if args.fp16 else None,
    )
    state = trainer._fresh_state(step)
    state = state.evolve(opt_state=adopted.attach(state.opt_state))
    return ts.donate(step), state, rates


def _announce(trainer: Any, plan: Plan, run: Run) -> None:
    args = trainer.args
    facts = {
        "Num examples": f"{plan.num_examples:,}",
        "Num epochs": f"{plan.num_train_epochs:,}",
        "Batch size per device": f"{trainer._train_batch_size:,}",
        "Total batch size (devices, accumulation)": f"{plan.total_batch_size:,}",
        "Gradient accumulation steps": args.gradient_accumulation_steps,
        "Total optimization steps": f"{plan.max_steps:,}",
        "Trainable parameters": f"{trainer.get_num_trainable_parameters():,}",
    }
    logger.info("***** Running training *****")
    for name, value in facts.items():
        logger.info("  %s = %s", name, value)
    if run.state.step:
        logger.info(
            "  Resuming at step %d: epoch %d, micro-batch %d", run.state.step, run.epoch, run.batch
        )


def _wind_up(trainer: Any, run: Run, meter: Meter, steps: int, memory: Stage) -> TrainOutput:
    args, state, plan = trainer.args, trainer.state, run.plan
    run.verify()
    logger.info("Training completed.")
    loss = meter.mean(run.state.step)
    # Speed is that of this session: a resumed run did not process what came before.
    share = steps / max(plan.max_steps, 1)
    metrics = speed_metrics("train", meter.started, plan.num_train_samples * share, steps)
    trainer.store_flos()
    metrics |= {"total_flos": float(state.total_flos), "train_loss": loss}
    trainer.is_in_train = False
    metrics |= memory.stop()
    trainer.log(metrics)
    saving.close(trainer)
    if args.load_best_model_at_end:
        trainer._load_best_model()
    if args.save_total_limit == 1 and state.best_model_checkpoint and args.should_save:
        saving.keep_only(
            Path(trainer._get_output_dir(trial=None)), Path(state.best_model_checkpoint)
        )
    trainer.control = trainer.callback_handler.on_train_end(args, state, trainer.control)
    return TrainOutput(state.global_step, loss, metrics)
