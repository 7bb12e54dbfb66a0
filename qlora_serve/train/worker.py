"""One process of a run of several; started by torchrun, never by hand."""

import os
import sys
from pathlib import Path

from qlora_serve.errors import QloraServeError
from qlora_serve.train.interrupt import die_with_parent
from qlora_serve.train.launch import STOPPED, WORKER_FOLDER, leave_note


def main() -> int:
    """Trains by the settings in the file that is the only argument."""
    die_with_parent()
    folder = Path(os.environ[WORKER_FOLDER])
    (folder / f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))

    from qlora_serve.progress import console, quieten_libraries
    from qlora_serve.train.config import TrainSettings
    from qlora_serve.train.parallel import PeerError
    from qlora_serve.train.run import train

    quieten_libraries()
    settings = TrainSettings.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        train(settings, lambda line: console.print(line, soft_wrap=True, markup=False))
    except PeerError:
        return 1  # the other one has said it
    except QloraServeError as error:
        leave_note("error", str(error))
        return 1
    except KeyboardInterrupt:
        leave_note(STOPPED, "")
        from qlora_serve.train.trainer import TrainingStopped

        # Orderly, in all processes alike: torchrun must not shoot at those that are still closing.
        return 0 if isinstance(sys.exc_info()[1], TrainingStopped) else 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads may wait for peers that have gone; there is nothing left to do here.
    os._exit(code)
