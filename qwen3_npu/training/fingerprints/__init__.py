"""What is kept of the tensors of a step, so that another machine or another run can be compared with it."""
