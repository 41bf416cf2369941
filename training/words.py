"""What all generators share: messages, pools of values, invented names, and how people type."""

import json
from collections.abc import Sequence
from random import Random

Message = dict[str, str]
"""`role`, `content`, and for some answers `given`: how it begins where a grammar forces the beginning.
That part is read and not learnt."""

LEAD_IN: tuple[str, ...] = (
    "",
    "",
    "",
    "",
    "",
    "",
    "hi, ",
    "hello! ",
    "please: ",
    "one question: ",
    "ok, ",
    "so ",
    "now, ",
)
HELD_OUT_LEAD_IN = ("hey there, ", "tell me, ", "next: ")

NAMES = (
    "Ana Ben Carla David Emma Felix Grace Hugo Ines Jonas Kim Lena Marco Nora Omar Paula Rosa Sam "
    "Tara Uma Victor Wanda Yara Zoe Alice Bob Carol Dan Eve Frank Maria John Peter Anna Tom Lucy "
    "Max Mia Leo Ada Alan Linus Guido Barbara Donald Edsger Radia Tim Vint Ken Dennis Margaret"
).split()
HELD_OUT_NAMES = "Priya Kofi Sigrid Bruno Chiara Dmitri Elif Farid Gwen Hiro Ann Oskar".split()
SURNAMES = (
    "Lee Smith Garcia Novak Rossi Weber Jones Silva Kim Patel Brown Berg Costa Moreau Sato Ali "
    "Khan Park Reed Stone Hill Cook Baker Wolf"
).split()
CITIES = (
    "Paris London Rome Berlin Madrid Lisbon Oslo Vienna Prague Dublin Athens Cairo Lima Quito Tokyo "
    "Kyoto Delhi Mumbai Sydney Toronto Boston Chicago Nairobi Accra Lagos Zurich Geneva Milan"
).split()
HELD_OUT_CITIES = "Porto Bergen Krakow Denver Hanoi Perth Seville Bern".split()
COUNTRIES = "France Italy Spain Japan Peru Egypt Kenya Norway India Brazil Canada Greece".split()
COLOURS = "red green blue yellow black white orange purple pink brown grey".split()
FRUIT = "apple pear plum cherry banana mango peach lemon orange grape melon fig".split()
THINGS = "book pen lamp chair table phone bag cup shirt hat watch bike desk ball key box".split()
WORDS = FRUIT + THINGS + COLOURS + "sun tree river stone cloud bird fish wind rain snow".split()
ANIMALS = "cat dog horse rabbit parrot turtle goat hamster duck pony".split()
JOBS = "teacher nurse baker pilot painter farmer driver chef doctor engineer writer clerk".split()
LANGUAGES = "English French German Spanish Italian Japanese Python Java Rust Hindi".split()
HOBBIES = "chess tennis reading cooking music hiking painting dancing running gardening".split()
COMPANIES = "Acme Globex Initech Umbra Northwind Contoso Bluebird Redwood".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday today tomorrow".split()
STATES = "open closed pending done active paused new shipped".split()
LEVELS = "low medium high".split()
ADJECTIVES = "old new small big quiet happy long short warm cold bright lost".split()


def turn(question: str, answer: str, given: str = "") -> list[Message]:
    """A question and its answer, of which `given` is the part that a grammar forces."""
    said = {"role": "assistant", "content": answer}
    return [{"role": "user", "content": question}, said | ({"given": given} if given else {})]


def invented(rng: Random) -> str:
    """A name that exists nowhere, pronounceable enough to be mistaken for one that does."""
    syllable = lambda: rng.choice("bcdfghklmnprstvwz") + rng.choice("aeiou")  # noqa: E731
    word = "".join(syllable() for _ in range(rng.randint(2, 4))) + rng.choice(("", "n", "x", "ler"))
    return word + "_" + syllable() + syllable() if rng.random() < 0.3 else word


def invented_word(rng: Random) -> str:
    return invented(rng).replace("_", "")


def vary(rng: Random, text: str) -> str:
    """Capitals, final punctuation and politeness as people happen to type them."""
    r = rng.random()
    if r < 0.35:
        text = text[:1].upper() + text[1:]
    if rng.random() < 0.25:
        text = text.rstrip("?")
    if rng.random() < 0.05:
        text += " please" if not text.endswith("?") else ""
    return rng.choice(LEAD_IN) + text if r > 0.3 else text


def listed(parts: Sequence[str], rng: Random) -> str:
    """ "a, b and c" or "a, b, c"."""
    if len(parts) > 1 and rng.random() < 0.6:
        return ", ".join(parts[:-1]) + " and " + parts[-1]
    return ", ".join(parts)


def compact(value: object) -> str:
    """JSON without optional white space, as a grammar may ask for."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
