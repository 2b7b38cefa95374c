"""What happened at each step: a line of JSON for machines, TensorBoard on request."""

import json
from pathlib import Path
from typing import Any

from tercet.errors import MissingExtraError
from tercet.files.atomic import clear_about, replacing_file


class Log:
    """Appends records to ``log.jsonl``; on resume it forgets what lies after the checkpoint."""

    def __init__(self, folder: Path, *, step: int, tensorboard: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        kept = [record for record in read(self.path) if record["step"] <= step and step > 0]
        with replacing_file(self.path) as fresh:
            fresh.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _tensorboard(folder, step) if tensorboard else None

    def write(self, step: int, **values: Any) -> None:
        """Add a record; numbers also go to TensorBoard."""
        with clear_about(self.path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish writing."""
        with clear_about(self.path):  # what could not be written is tried once more
            self._file.close()
        if self._board is not None:
            self._board.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a log, without a last line that a kill cut short."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("writing TensorBoard files", "tensorboard") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
