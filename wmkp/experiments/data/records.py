"""Records of a TFDS split, any of which may be unreadable: opening their files, and counting those that are bad."""

import logging
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from wmkp.experiments.config import InputError

logger = logging.getLogger(__name__)


def open_split(builder: Any, split: str, **decoders: Any) -> Any:
    """A split's TFDS data source, all of whose files can be opened and hold what they should.

    Records that are damaged within a file are not found here, but when they are read: each part of a file carries a
    checksum. Nothing tells a file from another whole one, with as many records, that has been put in its place.

    Args:
      builder: of TFDS, prepared for random access.
      split: its name.
      decoders: of TFDS, by feature, in place of the feature's own.

    Raises:
      InputError: naming the first file that is missing, truncated or garbled.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    def trouble(file: Any) -> str:
        if not Path(file.filename).exists():
            return "it is not there"
        reader = ArrayRecordReader(file.filename, options="readahead_buffer_size:0")
        if not reader.ok():
            return "it is truncated or garbled"
        records = reader.num_records()
        reader.close()
        return "" if records >= file.skip + file.take else f"it has {records} records, not {file.examples_in_shard}"

    files = builder.info.splits[split].file_instructions
    with ThreadPoolExecutor(16) as pool:
        for file, found in zip(files, pool.map(trouble, files), strict=True):
            if found:
                raise InputError(f"cannot read {file.filename}: {found}; prepare {builder.info.name} again")
    return builder.as_data_source(split=split, decoders=decoders or None)


class BadRecords(NamedTuple):
    """The records of a split that turned out to be unreadable, counted batch by batch.

    One bad record says little of a dataset's share of them: of a hundred records it is already 1%. So the count is
    fatal only when so many would come up less than once in a thousand times were ``max_bad`` of all records bad, by
    Chernoff's bound on a Poisson variable. At 0.1% these are 4 of the first 256 records, 7 of the first 1,000, 24 of
    the first 10,000 and 0.11% of 1,281,167. With ``max_bad`` 0 the first is fatal.

    Attributes:
      split: the split's name, for messages.
      examples: how many records it has.
      max_bad: the share of them that may be bad.
      seen: how many have been read, those read again included.
      indices: those found bad, each once.
    """

    split: str
    examples: int
    max_bad: float = 0.001
    seen: int = 0
    indices: frozenset[int] = frozenset()

    def add(self, bad: Iterable[int]) -> "BadRecords":
        """Counts one more batch, and warns once of each record that is bad.

        Args:
          bad: of each record read, its index if it is bad, or -1.

        Raises:
          InputError: too many are bad.
        """
        batch = [int(index) for index in bad]
        new = sorted(set(batch) - self.indices - {-1})
        total = self._replace(seen=self.seen + len(batch), indices=self.indices | set(new))
        if not new:
            return total
        shown = ", ".join(map(str, new[:8])) + (f" and {len(new) - 8} more" if len(new) > 8 else "")
        logger.warning("%s split: cannot read record %s; passed over", self.split, shown)
        seen, found = min(total.seen, self.examples), len(total.indices)
        expected = self.max_bad * seen
        if found > expected and (not expected or found * math.log(found / expected) - found + expected > math.log(1e3)):
            raise InputError(
                f"{found} of the first {seen} {self.split} records read are bad, record {new[0]} for one: more than "
                f"max_bad = {self.max_bad:g} allows; prepare the dataset again, or allow more"
            )
        return total
