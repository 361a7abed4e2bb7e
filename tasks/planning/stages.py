"""What a run costs: each stage's work, memory and files, from sizes alone.

A figure follows the stage's code: what it holds at once, what it writes, and in which dtype.
"""

from tasks.planning import fitcosts, scorecosts
from tasks.planning.planned import Planned, StageCost


def stage_costs(planned: Planned) -> list[StageCost]:
    """Of every stage, in their order."""
    return [
        fitcosts.training_cost(planned),
        fitcosts.tokenize_cost(planned),
        fitcosts.filter_cost(planned),
        fitcosts.factors_cost(planned),
        fitcosts.eigen_cost(planned),
        fitcosts.correct_cost(planned),
        scorecosts.query_cost(planned),
        scorecosts.stream_cost(planned),
        scorecosts.score_cost(planned),
        scorecosts.validate_cost(planned),
        scorecosts.report_cost(planned),
    ]
