"""The config of group-relative policy optimisation."""

from typing import TYPE_CHECKING, Any, Literal

from models.config import any_configs, config
from runner.data.corpus import refuse_several_sequences
from runner.learn.tasks.frozen_config import check_frozen
from runner.records.contracts import Inputs

if TYPE_CHECKING:
    from runner.learn.tasks.grpo import GRPO
    from runner.records.config import RunConfig


@config
class GRPOConfig:
    """Reinforcement learning from groups of answers: GRPO, Dr. GRPO, DAPO.

    In each step the model answers each problem of the batch `group` times; answers better than the
    mean of their group become likelier. Answers are drawn by (seed, number of the problem, member),
    so that a resumed run draws them again. `train.batch_size` counts problems, and
    `train.micro_batch` too. Validation logs `val_reward` of greedy answers, the mean over problems,
    its parts `val_reward/NAME`, and `val_answer_tokens`.

    Args:
        loss: see `runner.learn.tasks.grpo_loss`.
        rewards: by name, each with its `_target_`; see `runner.evaluate.rewards`.
        group: answers to a problem.
        max_new_tokens: the most tokens of an answer; the sequence may leave fewer.
        temperature, top_k: of sampling. The loss is that of the unmodified probabilities.
        stop: an answer ends before the first of these strings.
        tools: that the model may call, by name, see `runner.generate.tools`; what they give is not
            learnt.
        clip_low, clip_high: of the ratio. With one update a step it differs from 1 only where
            training has dropout, or computes otherwise than generation does.
        beta: coefficient of the KL divergence from the model that the run starts from.
        resample: groups of equal rewards are drawn again up to so many times. With dapo those
            that stay equal do not count in the divisor.
        skip_cut: answers that were cut off at the most tokens are not learnt from.
        rows: the most answers that are generated at a time (None: all of a step).
    """

    loss: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    rewards: dict[str, Any] = any_configs()
    group: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    tools: dict[str, Any] = any_configs()
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    resample: int = 0
    skip_cut: bool = False
    rows: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "group": (self.group >= 2, "at least 2: an answer is compared with the others"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature > 0, "above 0: greedy answers are all the same"),
            "top_k": (self.top_k is None or self.top_k >= 2, "at least 2"),
            "clip_low": (0 < self.clip_low < 1, "in (0, 1)"),
            "clip_high": (self.clip_high > 0, "above 0"),
            "beta": (self.beta >= 0, "at least 0"),
            "resample": (self.resample >= 0, "at least 0"),
            "rows": (self.rows is None or self.rows >= 1, "at least 1"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ValueError(f"task.{name}={getattr(self, name)} must be {wanted}")
        if not self.rewards:
            raise ValueError("task.rewards is empty; name one, as conf/task/grpo.yaml does")
        for name, reward in self.rewards.items():
            if not callable(getattr(reward, "score", None)):
                raise ValueError(
                    f"task.rewards.{name}={reward!r} must have a method score(answers); see "
                    "runner/evaluate/rewards.py"
                )

    @property
    def sequences_per_sample(self) -> int:
        """The answers to a problem; see `TaskConfig`."""
        return self.group

    def check(self, run: "RunConfig") -> None:
        """Refuse a run that cannot generate inside its steps, or that lacks its reference.

        Raises:
            ValueError: one of the two.
        """
        refuse_several_sequences(run.data, "grpo")
        if getattr(run.train, "parallel", None) == "fsdp":
            raise ValueError(
                "task=grpo generates texts of unequal lengths on each process, and "
                "train.parallel=fsdp needs equal numbers of passes; use train.parallel=ddp"
            )
        if self.beta and "init" not in run.inputs and not run.init:
            raise ValueError(
                f"task.beta={self.beta} is the weight of the divergence from the model to start "
                "from, and there is none; set inputs.init.runs=[FINGERPRINT] or init=hf:DIR, or "
                "task.beta=0"
            )
        if self.beta:
            check_frozen(f"task.beta={self.beta}", "init", run)
        if getattr(run.model, "causal", True) is False:
            raise ValueError("task=grpo samples one token after the other; use model.causal=true")

    def build(self, model: Any, tokenizer: Any, inputs: Inputs) -> "GRPO":
        """Return the task."""
        from runner.learn.tasks.grpo import GRPO  # noqa: PLC0415

        return GRPO(self, model, tokenizer, inputs)
