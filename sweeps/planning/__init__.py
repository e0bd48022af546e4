"""What a sweep will train: rows made into distinct trials, what is finished, what can be reused."""
