"""Words, places and calendars the skills draw from."""

from __future__ import annotations

import random


def split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


SPELLING: tuple[str, ...] = (
    split("""server token model cat dog house tree water apple bread orange banana lemon cherry table chair window door
kitchen garden flower river mountain ocean island bridge castle tower street city village country school
teacher student pencil paper book letter word number question answer story music guitar piano drum dance song
picture colour color green yellow purple white black brown silver golden summer winter spring autumn monday
tuesday wednesday thursday friday saturday sunday january february march april june july august september
october november december morning evening night today tomorrow yesterday hour minute second week month year
animal horse tiger lion monkey elephant rabbit turtle penguin dolphin spider butterfly llama computer keyboard
mouse screen memory program python language machine engine batch cache prefix stream request response client
socket kernel weight scale group order column matrix vector tensor layer attention embedding position prompt
temperature sample greedy perplexity quantise quantize checkpoint tokenizer template message system user
assistant number integer float double string object array list queue stack thread process packet network
internet browser website hello goodbye thanks please welcome friend family mother father sister brother baby
doctor nurse farmer sailor captain pilot happy sad angry brave clever gentle quick slow strong weak tall short
big small long round square heavy light warm cold hot run walk jump swim climb read write speak listen think
learn teach build break open close begin finish remember forget knife fork spoon plate bottle glass cup kettle
candle lamp mirror clock watch umbrella jacket trousers shirt button pocket bicycle train airplane rocket
planet moon star sun earth cloud rain snow wind storm thunder lightning rainbow beautiful because believe
business calendar different difficult enough favourite government height immediate interesting knowledge
library necessary neighbour occasion possible probably receive rhythm separate special strange successful
surprise through thought together tongue until vegetable weather whether yacht zebra quick brown fox jumps
over lazy alphabet sentence chocolate strawberry pineapple potato tomato carrot onion pepper cheese butter
honey sugar coffee breakfast dinner hospital station market museum theatre church factory office airport
harbour desert forest jungle valley meadow beach science history physics chemistry biology geography
mathematics addition subtraction graphics card processor electricity gptq llm gpu cpu api cuda http json
safetensors""")
)

CAPITALS: dict[str, str] = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "the United Kingdom": "London",
    "England": "London",
    "Scotland": "Edinburgh",
    "Ireland": "Dublin",
    "the Netherlands": "Amsterdam",
    "Belgium": "Brussels",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Sweden": "Stockholm",
    "Norway": "Oslo",
    "Denmark": "Copenhagen",
    "Finland": "Helsinki",
    "Iceland": "Reykjavik",
    "Greece": "Athens",
    "Turkey": "Ankara",
    "Russia": "Moscow",
    "Ukraine": "Kyiv",
    "Hungary": "Budapest",
    "the Czech Republic": "Prague",
    "Romania": "Bucharest",
    "the United States": "Washington, D.C.",
    "Canada": "Ottawa",
    "Mexico": "Mexico City",
    "Brazil": "Brasilia",
    "Argentina": "Buenos Aires",
    "Chile": "Santiago",
    "Peru": "Lima",
    "Cuba": "Havana",
    "China": "Beijing",
    "Japan": "Tokyo",
    "South Korea": "Seoul",
    "India": "New Delhi",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Morocco": "Rabat",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Australia": "Canberra",
    "New Zealand": "Wellington",
}
NO_CAPITALS: tuple[str, ...] = (
    split("""Mali Chad Niger Ghana Togo Benin Gabon Angola Zambia Malawi Nepal Bhutan Laos Oman Qatar Yemen Jordan Syria
Libya Sudan Albania Serbia Croatia Slovenia Slovakia Bulgaria Moldova Belarus Latvia Estonia Lithuania Malta
Cyprus Monaco Panama Belize Guyana Bolivia Paraguay Uruguay Ecuador Venezuela Colombia Haiti Jamaica Fiji
Samoa Tonga Mongolia Kazakhstan Georgia Armenia Ethiopia Somalia Uganda Rwanda Namibia Botswana Senegal
Cameroon Pakistan Bangladesh Malaysia Indonesia Atlantis Mars Europe Africa Texas California Bavaria Hogwarts
Narnia""")
)
CAPITAL_ALIASES: dict[str, str] = {
    "the UK": "the United Kingdom",
    "Great Britain": "the United Kingdom",
    "the USA": "the United States",
    "the US": "the United States",
    "Holland": "the Netherlands",
    "America": "the United States",
    "Czechia": "the Czech Republic",
}

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
SEASONS = ("spring", "summer", "autumn", "winter")
ORDINALS = (
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
)
NUMBER_WORDS = split(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)

_PAIRS = (
    "hot cold|big small|high low|long short|fast slow|up down|left right|day night|good bad|happy sad|old new|"
    "open closed|full empty|hard soft|heavy light|rich poor|strong weak|wet dry|black white|early late|near far|"
    "first last|loud quiet|clean dirty|always never|in out|begin end|love hate|true false|inside outside"
)
OPPOSITES: dict[str, str] = {}
for _pair in _PAIRS.split("|"):
    _a, _b = _pair.split()
    OPPOSITES[_a], OPPOSITES[_b] = _b, _a

SOUNDS: dict[str, str] = {
    "cow": "moo",
    "dog": "woof",
    "cat": "meow",
    "sheep": "baa",
    "duck": "quack",
    "pig": "oink",
    "bee": "buzz",
    "owl": "hoot",
    "frog": "ribbit",
    "horse": "neigh",
    "lion": "roar",
    "snake": "hiss",
    "mouse": "squeak",
    "rooster": "cock-a-doodle-doo",
}
HELLO: dict[str, str] = {
    "French": "Bonjour!",
    "German": "Guten Tag!",
    "Spanish": "¡Hola!",
    "Italian": "Ciao!",
    "Portuguese": "Olá!",
    "Dutch": "Hallo!",
    "Polish": "Cześć!",
    "Russian": "Привет!",
    "Greek": "Γειά σου!",
    "Turkish": "Merhaba!",
    "Japanese": "こんにちは",
    "Chinese": "你好",
    "Korean": "안녕하세요",
    "Hindi": "नमस्ते",
    "Arabic": "مرحبا",
    "Hebrew": "שלום",
    "Swedish": "Hej!",
    "Czech": "Ahoj!",
}
COLOURS = split("red green blue yellow black white orange purple pink brown grey")
FOODS = split("pizza pasta soup bread cheese chocolate rice salad cake honey apples bananas noodles pancakes")

_ONSETS = split(
    "b c d f g h j k l m n p r s t v w z bl br ch cl cr dr fl fr gl gr kn pl pr qu sh sk sl sm sn sp st str th tr tw wh"
)
_VOWELS = split("a e i o u ai ea ee ie oa oo ou y")
_CODAS = ("", *split("b ck d ff g l ll m n nd ng nk nt p r rd rk rm rn rt s sh ss st t th x"))


def pseudo_word(rng: random.Random) -> str:
    """A pronounceable word that is in no list, so that copying and spelling are learnt and not remembered."""
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.choice((1, 1, 2, 2, 2, 3)))
    )
