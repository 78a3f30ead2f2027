"""Where the work is done: the same op names on every backend, no autograd."""
