"""``python -m syncbn.doctor``: whether the processes of a job can train together; if not, what is wrong and where."""
