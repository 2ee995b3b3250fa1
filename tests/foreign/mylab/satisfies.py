"""Checked by mypy: each class of the package satisfies its contract without subclassing."""

from mylab.count_letters import CountLettersConfig
from mylab.counter import Counter, CounterConfig
from mylab.letters import LettersConfig
from mylab.reconstruction import Reconstruction, ReconstructionConfig
from mylab.weight_norm import WeightNormConfig
from runner.data.corpus import Corpus
from runner.records.contracts import Evaluation, Measure, Task, TaskConfig, Work


def check() -> None:
    """Assign each to the type of its contract."""
    work: Work = CountLettersConfig()
    task_config: TaskConfig = ReconstructionConfig()
    task: Task = Reconstruction(0.3, 0)
    measure: Measure = Reconstruction.measure
    evaluation: Evaluation = WeightNormConfig()
    corpus: Corpus = Counter(LettersConfig().build(()), CounterConfig().stride)
    assert all((work, task_config, task, measure, evaluation, corpus))
