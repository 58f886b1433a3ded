"""What every rank of a layout reads of a checkpoint: the plan, its table, its picture."""
