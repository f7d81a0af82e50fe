"""Seconds that a program spends in its parts. Not a program: growth.py and limit.py use it."""

import time

import torch


class Clock:
    """seconds[part]: time in the functions that time() was told of; what one of them calls counts as part of it."""

    def __init__(self, cuda):
        self.cuda, self.seconds, self.inside, self.began = cuda, {}, False, None

    def start(self):
        """Forget all so far. Before this, nothing counts."""
        self.seconds, self.began = {}, time.perf_counter()

    def time(self, part, owner, name):
        """From now on, owner.name counts as `part`."""
        function = getattr(owner, name)

        def call(*args, **kwargs):
            if self.inside:
                return function(*args, **kwargs)
            self.inside = True
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            if self.cuda:
                torch.cuda.synchronize()
            if self.began is not None:
                self.seconds[part] = self.seconds.get(part, 0) + time.perf_counter() - begin
            self.inside = False
            return result

        setattr(owner, name, call)

    def stop(self):
        """Seconds since start(), of which `seconds` are the parts."""
        total, self.began = time.perf_counter() - self.began, None
        return total
