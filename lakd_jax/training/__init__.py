"""The mechanics of one training: state, step, loop, evaluation."""
