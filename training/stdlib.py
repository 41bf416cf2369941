"""What Python's own docstrings say, as a table of qualified name -> one or two clean sentences.

The table is bounded on purpose: a model of four million parameters recites a few hundred facts
reliably or several thousand badly. Everything importable but left out is used as a negative, so
that the model learns to say that it does not know.
"""

import doctest
import importlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path

EXAMPLES_FILE = Path(__file__).with_name("examples.txt")
MAX_CHARS = 190
MAX_SIGNATURE = 44

# Module -> names. "*" takes what the module exports (at most `STAR_LIMIT`, in order of __all__).
MODULES: dict[str, str] = {
    "builtins": "abs all any ascii bin bool bytearray bytes callable chr classmethod compile complex "
    "delattr dict dir divmod enumerate eval exec filter float format frozenset getattr globals "
    "hasattr hash help hex id input int isinstance issubclass iter len list locals map max "
    "memoryview min next object oct open ord pow print property range repr reversed round set "
    "setattr slice sorted staticmethod str sum super tuple type vars zip "
    "KeyError ValueError TypeError IndexError AttributeError StopIteration ZeroDivisionError "
    "FileNotFoundError ImportError RuntimeError KeyboardInterrupt NotImplementedError "
    "AssertionError PermissionError TimeoutError UnicodeDecodeError",
    "str": "capitalize center count encode endswith expandtabs find format index isalnum "
    "isalpha isdigit islower isspace isupper join ljust lower lstrip maketrans "
    "partition removeprefix removesuffix replace rfind rjust rsplit rstrip split "
    "splitlines startswith strip title translate upper zfill",
    "list": "append clear copy count extend index insert pop remove reverse sort",
    "dict": "clear copy fromkeys get items keys pop popitem setdefault update values",
    "set": "add clear difference discard intersection isdisjoint issubset issuperset "
    "symmetric_difference union",
    "bytes": "decode fromhex hex",
    "int": "bit_length from_bytes to_bytes",
    "float": "as_integer_ratio is_integer",
    "os": "chdir chmod cpu_count environ getcwd getenv getpid kill listdir makedirs mkdir "
    " remove  rename replace rmdir scandir stat symlink system  "
    " urandom walk write access close get_terminal_size",
    "os.path": "abspath basename commonpath commonprefix dirname exists expanduser "
    "getmtime getsize isabs isdir isfile islink join normpath realpath relpath split "
    "splitext",
    "pathlib": "Path PurePath",
    "pathlib.Path": "absolute cwd exists expanduser glob home is_dir is_file iterdir joinpath mkdir "
    "open read_bytes read_text rename resolve rglob rmdir stat touch with_name with_suffix "
    "write_bytes write_text",
    "sys": "argv exit getrecursionlimit getsizeof setrecursionlimit  getdefaultencoding ",
    "json": "dump dumps load loads JSONDecodeError JSONEncoder JSONDecoder",
    "re": "compile escape findall finditer fullmatch match search split sub subn purge",
    "itertools": "accumulate chain combinations combinations_with_replacement compress count cycle "
    "dropwhile filterfalse groupby islice pairwise permutations product repeat starmap takewhile "
    "tee zip_longest",
    "functools": "cache cached_property cmp_to_key lru_cache partial reduce "
    "singledispatch total_ordering update_wrapper wraps",
    "collections": "ChainMap Counter OrderedDict UserDict defaultdict deque namedtuple",
    "collections.Counter": "elements most_common subtract update",
    "collections.deque": "append appendleft pop popleft rotate",
    "math": "acos asin atan atan2 ceil comb copysign cos degrees dist exp fabs factorial floor "
    " fsum gamma gcd hypot inf isclose isfinite isinf isnan isqrt lcm log log10 log1p log2 "
    " perm prod radians sin sqrt tan trunc",
    "random": "choice choices gauss getrandbits randint random randrange sample seed shuffle "
    "uniform ",
    "statistics": "correlation fmean geometric_mean mean median "
    " mode multimode   quantiles stdev variance ",
    "datetime": "date datetime time timedelta timezone tzinfo",
    "datetime.datetime": "astimezone combine fromisoformat fromtimestamp isoformat now replace "
    "strftime strptime timestamp today utcnow",
    "datetime.date": "fromisoformat isoformat today weekday isocalendar",
    "time": "asctime ctime gmtime localtime mktime monotonic perf_counter process_time sleep "
    "strftime strptime time time_ns",
    "string": "Formatter Template capwords",
    "textwrap": "dedent fill indent shorten wrap",
    "shutil": "copy copy2 copyfile copyfileobj copytree disk_usage move rmtree "
    " which get_terminal_size ",
    "glob": "escape glob iglob",
    "fnmatch": "filter fnmatch fnmatchcase translate",
    "tempfile": "NamedTemporaryFile TemporaryDirectory TemporaryFile gettempdir mkdtemp mkstemp",
    "subprocess": "CalledProcessError CompletedProcess Popen call check_call check_output getoutput "
    "run ",
    "threading": "Barrier Condition Event RLock Semaphore Thread Timer "
    "active_count current_thread enumerate local",
    "asyncio": "CancelledError Condition Event Future Lock Queue Semaphore Task TaskGroup "
    "create_subprocess_exec create_task gather get_running_loop iscoroutine new_event_loop run "
    "shield sleep start_server timeout to_thread wait wait_for as_completed",
    "contextlib": "AsyncExitStack ContextDecorator ExitStack asynccontextmanager chdir closing "
    "contextmanager nullcontext redirect_stderr redirect_stdout suppress",
    "dataclasses": "asdict dataclass field fields is_dataclass replace",
    "enum": "Enum Flag IntEnum StrEnum auto unique",
    "typing": "Any Callable NamedTuple NewType Protocol TypeVar TypedDict cast get_type_hints "
    "overload runtime_checkable final Optional Union Literal Generic",
    "copy": "copy deepcopy",
    "operator": "add attrgetter contains eq itemgetter mul not_ sub ",
    "heapq": "heapify heappop heappush merge nlargest nsmallest",
    "bisect": "bisect_left bisect_right insort_left insort_right",
    "array": "array",
    "hashlib": "new sha256 md5 ",
    "hmac": "compare_digest new digest",
    "base64": " b64decode b64encode  urlsafe_b64encode ",
    "binascii": "crc32 hexlify unhexlify",
    "secrets": "choice randbelow token_bytes token_hex token_urlsafe compare_digest",
    "uuid": "UUID uuid4 uuid5",
    "csv": "DictReader DictWriter Sniffer reader writer",
    "io": "BytesIO StringIO TextIOWrapper ",
    "pickle": "dump dumps load loads",
    "struct": "calcsize pack unpack ",
    "logging": "basicConfig critical debug error exception getLogger info log warning Logger "
    "Handler Formatter StreamHandler FileHandler disable",
    "argparse": "ArgumentParser Namespace FileType",
    "urllib.parse": "parse_qs quote quote_plus unquote urlencode urljoin urlparse ",
    "urllib.request": "Request urlopen urlretrieve",
    "http.server": "BaseHTTPRequestHandler HTTPServer SimpleHTTPRequestHandler",
    "socket": "create_connection create_server getaddrinfo gethostbyname gethostname socketpair "
    "getfqdn socket",
    "ipaddress": "ip_address ip_network IPv4Address",
    "queue": "LifoQueue PriorityQueue Queue SimpleQueue Empty Full",
    "concurrent.futures": "Executor Future ProcessPoolExecutor ThreadPoolExecutor as_completed wait",
    "multiprocessing": "Process",
    "decimal": "Decimal Context localcontext getcontext",
    "fractions": "Fraction",
    "zlib": "adler32 compress crc32 decompress",
    "gzip": "compress decompress open GzipFile",
    "bz2": "compress decompress open",
    "lzma": "compress decompress open",
    "zipfile": "ZipFile is_zipfile ",
    "tarfile": "is_tarfile TarFile ",
    "configparser": "ConfigParser RawConfigParser",
    "tomllib": "load loads",
    "sqlite3": "connect Connection Cursor Row",
    "inspect": "getdoc getfile getmembers getmodule getsource isclass isfunction signature stack ",
    "traceback": "format_exc print_exc ",
    "unittest": "TestCase TestLoader TestSuite main skip expectedFailure",
    "unittest.mock": "Mock MagicMock patch mock_open AsyncMock",
    "doctest": "testmod testfile",
    "types": "SimpleNamespace MappingProxyType ModuleType new_class",
    "weakref": "WeakKeyDictionary WeakSet WeakValueDictionary finalize proxy",
    "abc": "ABC ABCMeta abstractmethod",
    "getpass": "getpass getuser",
    "platform": "machine node platform processor python_version release system uname",
    "difflib": "Differ SequenceMatcher get_close_matches ndiff unified_diff ",
    "pprint": "PrettyPrinter pformat pprint ",
    "calendar": "isleap monthrange weekday timegm Calendar",
    "html": "escape unescape",
    "html.parser": "HTMLParser",
    "xml.etree.ElementTree": "Element ElementTree SubElement fromstring parse tostring indent",
    "ast": "dump literal_eval parse unparse walk NodeVisitor NodeTransformer get_docstring",
    "dis": "dis",
    "timeit": "Timer timeit repeat",
    "warnings": "catch_warnings filterwarnings simplefilter warn",
    "gc": "collect disable enable isenabled freeze",
    "signal": " signal",
    "importlib": "import_module reload ",
    "importlib.metadata": "version metadata requires",
    "importlib.resources": "files ",
    "graphlib": "TopologicalSorter",
    "contextvars": "ContextVar Context copy_context",
    "zoneinfo": "ZoneInfo ",
    "codecs": "decode encode lookup open",
    "unicodedata": "category name normalize lookup",
    "shlex": "join quote split",
    "pdb": "set_trace post_mortem run",
    "webbrowser": "open",
    "keyword": "iskeyword",
    "atexit": "register",
    "email.message": "EmailMessage",
}

# Where the docstring is absent, or too terse to answer a question with. Our own words.
OWN_WORDS: dict[str, str] = {
    "sys.argv": "The list of command-line arguments; sys.argv[0] is the name of the script.",
    "os.environ": "A mapping of the environment variables of the process.",
    "math.inf": "A floating-point positive infinity.",
    "argparse.ArgumentParser": "Object for parsing command line strings into Python objects.",
    "logging.info": "Log a message with severity INFO on the root logger.",
    "asyncio.sleep": "Coroutine that completes after a given time (in seconds).",
    "os.walk": "Directory tree generator. For each directory it yields a tuple "
    "(dirpath, dirnames, filenames).",
    "contextlib.contextmanager": "Decorator that makes a context manager from a generator "
    "function that yields once.",
    "dataclasses.dataclass": "Add dunder methods based on the fields defined in the class. "
    "Examines annotations to determine fields.",
    "functools.lru_cache": "Least-recently-used cache decorator. If maxsize is None, the cache can "
    "grow without bound.",
    "collections.Counter": "Dict subclass for counting hashable items. Elements are stored as "
    "dictionary keys and their counts as values.",
    "subprocess.run": "Run command with arguments and return a CompletedProcess instance.",
    "threading.Thread": "A class that represents a thread of control.",
    "pathlib.Path": "A path on the file system, with methods that do system calls on it.",
    "sqlite3.connect": "Open a connection to an SQLite database file and return it.",
    "builtins.open": "Open file and return a stream. Raise OSError upon failure.",
    "builtins.zip": "Iterate over several iterables in parallel, yielding tuples with an item "
    "from each one.",
    "builtins.range": "Return an object that produces a sequence of integers from start "
    "(inclusive) to stop (exclusive) by step.",
    "builtins.type": "With one argument, return the type of an object. With three, make a new "
    "class.",
    "builtins.dict": "A mapping from keys to values that keeps insertion order.",
    "builtins.int": "Convert a number or string to an integer.",
    "builtins.str": "Create a new string object from the given object.",
    "hashlib.sha256": "Return a SHA-256 hash object; optionally initialized with bytes.",
    "hashlib.md5": "Return an MD5 hash object; optionally initialized with bytes.",
    "re.compile": "Compile a regular expression pattern, returning a Pattern object.",
    "time.perf_counter": "Performance counter for benchmarking, in fractional seconds.",
    "datetime.datetime.now": "Return the current local date and time; with tz, the time in that "
    "time zone.",
    "csv.reader": "Return a reader object that iterates over the lines of a CSV file, each a list of "
    "strings.",
    "csv.writer": "Return a writer object that turns rows into delimited lines of a CSV file.",
    "datetime.datetime": "A date and a time of day, with an optional time zone.",
    "datetime.date": "A calendar date: year, month and day.",
    "datetime.datetime.strftime": "Format the date and time as a string, by a format such as %Y-%m-%d.",
    "datetime.datetime.strptime": "Parse a string into a datetime, by a format such as %Y-%m-%d.",
    "datetime.datetime.combine": "Make a datetime from a date and a time.",
    "datetime.timedelta": "A duration: the difference between two dates or times.",
    "dict.items": "Return a view of the dictionary's (key, value) pairs.",
    "dict.keys": "Return a view of the dictionary's keys.",
    "dict.values": "Return a view of the dictionary's values.",
    "dict.pop": "Remove the key and return its value, or the default if the key is absent.",
    "str.join": "Concatenate any number of strings, with the string itself inserted between them.",
    "builtins.bytearray": "A mutable sequence of bytes.",
    "builtins.bytes": "An immutable sequence of bytes.",
    "builtins.slice": "A slice object, as used for extended slicing such as a[0:10:2].",
    "builtins.iter": "Return an iterator over an object.",
    "builtins.dir": "Return the names in the current scope, or the attributes of the object given.",
    "builtins.super": "Return a proxy that delegates method calls to a parent class.",
    "builtins.list": "Built-in mutable sequence.",
    "builtins.vars": "Return the __dict__ of an object; without argument, the same as locals().",
    "str.maketrans": "Return a translation table for str.translate.",
    "concurrent.futures.ThreadPoolExecutor": "An executor that runs calls in a pool of threads.",
    "concurrent.futures.ProcessPoolExecutor": "An executor that runs calls in a pool of processes.",
    "hashlib.new": "Return a new hash object of the named algorithm, optionally initialized with bytes.",
    "math.gcd": "Return the greatest common divisor of the integers.",
    "math.lcm": "Return the least common multiple of the integers.",
    "typing.Optional": "Optional[X] is equivalent to X | None.",
    "typing.Union": "Union[X, Y] is equivalent to X | Y: either X or Y.",
    "typing.Literal": "A type that is satisfied only by the given literal values.",
}

_SIGNATURE_LINE = re.compile(r"^[\w.]+\([^\n]{0,200}\)( ?-+> ?.{0,60})?( --? .*)?$")
_ARROW_PREFIX = re.compile(r"^[\w.]+\([^\n]{0,100}\) ?-+>? ?[^.]{0,30}?(?: -- |: |\. )")


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing of the standard library that the model should know."""

    name: str  # qualified, as a person would write it: "os.path.join", "len"
    module: str  # "os.path"; "" for builtins
    kind: str  # "function", "class", "method", "exception", "module", "value"
    signature: str  # "(a, *p)" or ""
    text: str  # one or two sentences
    example: tuple[str, str] | None  # (expression, its repr)

    @property
    def popular(self) -> bool:
        return self.example is not None


def first_sentences(doc: str, limit: int = MAX_CHARS) -> str:
    """The first paragraph of prose of a docstring, cut at a sentence end below `limit` characters."""
    for paragraph in inspect.cleandoc(doc).split("\n\n"):
        lines = [line.strip() for line in paragraph.strip().splitlines()]
        while lines and _SIGNATURE_LINE.match(lines[0]):
            tail = lines.pop(0).partition(" -- ")[2]
            if tail:
                lines.insert(0, tail)
                break
        text = _ARROW_PREFIX.sub("", " ".join(lines)).strip()
        text = text.replace("``", "").replace("`", "").replace("  ", " ")
        text = re.sub(r"^[\w.]+\.py[ :-]+", "", text)
        text = re.sub(r":(?:class|func|meth|mod|exc|data):", "", text)
        if len(text) < 12 or ">>>" in text or "->" in text or text.startswith(("*", "|")):
            continue
        return _cut(text, limit)
    return ""


def _cut(text: str, limit: int) -> str:
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z`'])", text)
    out = sentences[0]
    if len(sentences) > 1 and len(out) + 1 + len(sentences[1]) <= limit:
        out += " " + sentences[1]
    if len(out) > limit:
        out = out[:limit].rpartition(", ")[0] or out[:limit].rpartition(" ")[0]
    out = out.rstrip(" ,:;-")
    out = out[:1].upper() + out[1:]
    return out if out.endswith((".", "!", "?", ")")) else out + "."


def _signature(obj: object) -> str:
    try:
        signature = inspect.signature(obj)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    parts: list[str] = []
    star = False
    for name, p in signature.parameters.items():
        if name in ("self", "cls") or name.startswith("_"):
            continue
        if p.kind is p.VAR_POSITIONAL:
            parts.append("*" + name)
            star = True
        elif p.kind is p.VAR_KEYWORD:
            parts.append("**" + name)
        else:
            if p.kind is p.KEYWORD_ONLY and not star:
                parts.append("*")
                star = True
            simple = isinstance(p.default, (int, str, float, bool, type(None)))
            if p.default is p.empty:
                parts.append(name)
            elif simple and len(repr(p.default)) < 12:
                parts.append(f"{name}={p.default!r}")
            else:
                parts.append(f"{name}=...")
    text = "(" + ", ".join(parts) + ")"
    if len(text) <= MAX_SIGNATURE:
        return text
    kept = [part for part in parts if "=" not in part and part != "*" and part[:2] != "**"]
    text = "(" + ", ".join([*kept, "..."]) + ")"
    return text if len(text) <= MAX_SIGNATURE else ""


def _resolve(module: str) -> object:
    """The object that `module` names: a module, or a class inside one ("pathlib.Path")."""
    try:
        return importlib.import_module(module)
    except ImportError:
        parent, _, leaf = module.rpartition(".")
        return getattr(importlib.import_module(parent or "builtins"), leaf)


def _kind(obj: object, owner: object) -> str:
    if inspect.isclass(obj):
        return "exception" if issubclass(obj, BaseException) else "class"
    if inspect.isclass(owner):
        return "method"
    return "function" if callable(obj) else "value"


def read_examples(path: Path = EXAMPLES_FILE) -> dict[str, tuple[str, str]]:
    """Name -> (expression, value), from a doctest file: `python -m doctest` proves each of them."""
    out: dict[str, tuple[str, str]] = {}
    name = ""
    for part in doctest.DocTestParser().parse(path.read_text()):
        if isinstance(part, str):
            words = [line.strip() for line in part.splitlines() if line.strip()]
            name = words[-1] if words else name
        elif part.want:
            out[name] = (part.source.strip(), part.want.strip())
    return out


def build_table() -> list[Entry]:
    """Every entry, modules included, in a fixed order."""
    examples = read_examples()
    entries: list[Entry] = []
    for module, names in MODULES.items():
        owner = _resolve(module)
        if inspect.ismodule(owner) and module not in ("builtins", "os.path"):
            text = first_sentences(OWN_WORDS.get(module) or inspect.getdoc(owner) or "", 150)
            if text:
                entries.append(Entry(module, module, "module", "", text, None))
        for name in names.split():
            obj = getattr(owner, name, None)
            qualified = name if module == "builtins" else f"{module}.{name}"
            key = f"{module}.{name}"
            text = OWN_WORDS.get(key) or first_sentences(inspect.getdoc(obj) or "")
            if obj is None or not text:
                continue
            home = module if inspect.ismodule(owner) else module.rpartition(".")[0]
            home = "" if home == "builtins" else home
            sig = _signature(obj) if callable(obj) and "typing" not in module else ""
            entries.append(
                Entry(qualified, home, _kind(obj, owner), sig, text, examples.get(qualified))
            )
    return entries


def unlisted_names(known: set[str], limit: int = 3000) -> list[str]:
    """Importable names that the table leaves out: the model must say that it does not know them."""
    out: list[str] = []
    for module in [*MODULES, "imaplib", "ftplib", "poplib", "curses", "plistlib", "netrc", "trace"]:
        if module in ("builtins", "turtle", "tkinter"):
            continue
        try:
            owner = _resolve(module)
        except ImportError:
            continue
        for name in sorted(dir(owner)):
            qualified = f"{module}.{name}"
            if not name.startswith("_") and qualified not in known:
                out.append(qualified)
    return out[:: max(1, len(out) // limit)]
