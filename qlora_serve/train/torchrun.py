"""torchrun without its own words: what went wrong is said once, by `launch`."""

import logging
import sys

from qlora_serve.train.interrupt import die_with_parent


def main() -> int:
    """Runs torchrun with this process's arguments; 1 if a process of it failed."""
    die_with_parent()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.disable(logging.CRITICAL)
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
