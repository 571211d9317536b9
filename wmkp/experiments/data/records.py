"""Records of a TFDS split: opens their files, and counts the unreadable ones."""

import logging
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from wmkp.experiments.config import InputError

logger = logging.getLogger(__name__)


def open_split(builder: Any, split: str, **decoders: Any) -> Any:
    """A split's TFDS data source, after a check that all files open and hold enough records.

    Damaged records inside a file show only when they are read, by checksums. A file that was replaced by another complete
    one with as many records is not noticed.

    Args:
      builder: a TFDS builder, prepared for random access.
      split: the split's name.
      decoders: TFDS decoders by feature, instead of the features' own.

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
    """The unreadable records of a split, counted batch by batch.

    One bad record in a hundred is 1 %, but says little about the whole dataset. So the count is fatal only if it would
    occur less than once in a thousand times with a share ``max_bad`` of bad records, by Chernoff's bound on a Poisson
    variable. At 0.1 % these are 4 of the first 256 records, 7 of the first 1,000, 24 of
    the first 10,000 and 0.11% of 1,281,167. With ``max_bad`` 0 the first is fatal.

    Attributes:
      split: the split's name, for messages.
      examples: the number of records.
      max_bad: the largest share that may be bad.
      seen: the number of reads, repeated ones included.
      indices: the bad records, each once.
    """

    split: str
    examples: int
    max_bad: float = 0.001
    seen: int = 0
    indices: frozenset[int] = frozenset()

    def add(self, bad: Iterable[int]) -> "BadRecords":
        """Counts one more batch, and warns once of each bad record.

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
                f"{found} of the first {seen} {self.split} records read are bad (record {new[0]} is one), more than "
                f"--max-bad {self.max_bad:g} allows; prepare the dataset again, or raise --max-bad"
            )
        return total
