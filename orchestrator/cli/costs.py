"""The lines of `status` about money, where `cluster:` has prices (orchestrator/cost.py)."""

from orchestrator.cli.watch import duration
from orchestrator.cost import Bill, money, told


def bill_lines(bill: Bill) -> list[str]:
    """What all stages cost, each once; and the head, which serves them all."""
    lines = []
    if bill.costs:
        guessed = any(cost.at_most for cost in bill.costs)
        why = "; stages that do not train: their most workers, on the dearest type that fits" if guessed else ""
        lines.append(f"cost of workers: {told(bill.costs, bill.currency)}{why}")
    if bill.head is not None:
        when = f"{duration(bill.head_s)} in which stages ran"
        lines.append(f"cost of the head: {money(bill.head, bill.currency)}, {when}")
    return lines
