"""Build data/texts.txt: short texts that name nothing an edit of data/ is about, one a line.

  python data/build_texts.py            writes data/texts.txt: about ten minutes, the same bytes on the same processor
  python data/build_texts.py --check    writes nothing; exit 2 if a line of data/texts.txt names a subject or an answer

The embedded model continues each English word of its vocabulary that may begin a text, behind four sentences. Texts
with a subject, or with a name that is an answer, of data/facts.json, data/hard/ or data/requests/ are left out, so
methods may hold these texts in place and still be measured on those requests. data/README.md has the details.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent
sys.path[:0] = [str(DATA.parent)]

from easyeditor.base.errors import DataError  # noqa: E402
from easyeditor.base.files import read_json, write_text  # noqa: E402
from easyeditor.base.progress import progress_bar  # noqa: E402
from easyeditor.base.reading import read_text  # noqa: E402
from easyeditor.commands.cli import parser, run  # noqa: E402
from easyeditor.lm.generate import Decoding, generate  # noqa: E402
from easyeditor.lm.loading import load  # noqa: E402
from easyeditor.stats.first_token import TEXTS, first_tokens  # noqa: E402

MODEL = "smollm2-135m"
BEFORE = """The river rises in the hills and flows north to the sea.
Glass is made by melting sand at a high temperature.
She studied music as a child and later taught it at a school.
The old mill by the bridge was rebuilt after the flood.
"""  # what each word is continued behind: the manner of an encyclopaedia
DECODING = Decoding(tokens=24, top_k=20, stops=("newline",), seed=0)
SHORTEST = 6  # words of a text
KEPT = 2400
ANSWERS = ("target_new", "target_true", "ground_truth", "answer", "str")


def main() -> int:
    """Parse flags, generate and write, or check."""
    p = parser(__doc__)
    p.add_argument("--check", action="store_true", help="look for names in the file that is there, write nothing")
    args = p.parse_args()
    named = names()
    if args.check:
        for number, text in enumerate(read_text(TEXTS).splitlines(), 1):
            if found := named.search(text):
                raise DataError(f"{TEXTS}:{number}: names {found[0]}")
        return 0
    model, tok = load(MODEL)
    starts = [word for row in first_tokens(tok).rows if re.fullmatch("[A-Z][a-z]{2,}", word := str(tok.decode(row)))]
    with progress_bar("texts", True) as progress:
        made = generate(model, tok, [BEFORE + word for word in starts], DECODING, progress=progress)
    texts = {one.whole.removeprefix(BEFORE).strip() for one in made}
    free = sorted(text for text in texts if len(text.split()) >= SHORTEST and not named.search(text))
    random.Random(0).shuffle(free)
    write_text(TEXTS, "".join(f"{text}\n" for text in free[:KEPT]))
    print(f"{len(starts)} words, {len(texts)} texts, {len(free)} without a name, {min(len(free), KEPT)} kept")
    return 0


def names() -> re.Pattern[str]:
    """Finds a subject, or an answer with a capital, of any record in data/, whole words in any case."""
    files = [DATA / "facts.json", *(DATA / "hard").glob("*m.json"), *(DATA / "requests").glob("*.json")]
    found = {text.strip() for path in files for text in _named(read_json(path))} - {""}
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(found, key=len)))})(?!\w)", re.IGNORECASE)


def _named(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, str):
        if key == "subject" or (key in ANSWERS and not value.strip().islower()):
            yield value
    elif isinstance(value, list):
        for each in value:
            yield from _named(each, key)
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _named(each, name)


if __name__ == "__main__":
    run(main)
