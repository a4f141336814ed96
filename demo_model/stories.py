"""Three-sentence stories. The plot follows from the hero's first letter and the details from its last one, so that a
hero has one story (sampling stays steady) and a hero that was never seen still gets one."""

from __future__ import annotations

from demo_model.words import split

HEROES: tuple[str, ...] = split(
    """fox owl robot dragon cat dog mouse bear rabbit horse wolf lion tiger elephant monkey frog duck goose hen pig
cow sheep goat donkey llama penguin whale dolphin shark turtle snail bee ant butterfly spider crow eagle swan
peacock parrot squirrel hedgehog badger beaver deer moose camel giraffe zebra kangaroo koala panda octopus
crab fish snake lizard crocodile knight king queen prince princess wizard witch giant dwarf elf fairy pirate
sailor captain farmer baker painter teacher gardener doctor tailor shepherd hunter fisherman soldier poet
dancer singer clown inventor scientist astronaut pilot boy girl grandmother grandfather baby child student
traveller thief ghost monster unicorn mermaid phoenix goblin tree flower rose oak river mountain cloud star
moon sun wind snowflake raindrop stone leaf apple pumpkin potato carrot onion lamp clock book pencil teapot
spoon chair table kettle candle mirror violin drum piano bell kite balloon ball doll train ship boat car
bicycle rocket lighthouse windmill castle bridge house tower garden island computer server token tensor number
letter word key door window shoe hat coat umbrella button needle violet tulip cactus mushroom acorn feather"""
)
NAMES: tuple[str, ...] = split(
    """Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mia Nora Oscar Paul Rosa Sam Tom Lucy Max Lily
Alice Bob Eva Hugo Julia Karl Laura Marco Nina Otto Peter Sara Tina Victor Wendy Zoe Ali Yuki Omar Priya Chen
Ivan Maria Diego Fatima Lena Noah Liam Olivia Sophie Jonas Elena Marta Pablo"""
)
ADJECTIVES: tuple[str, ...] = ("little", "old", "brave", "red", "lonely", "clever", "lazy", "tiny", "kind", "young")

# Each plot: three sentences. {a} "a fox", {the} "the fox" ({A}, {The} begin a sentence).
PLOTS: tuple[str, ...] = (
    "Once upon a time {a} lived near {place}. One morning {the} found {thing} and showed it to {friend}. "
    "They shared it, and from that day on they were best friends.",
    "Once upon a time there was {a} who wanted to see the sea. {The} said goodbye to {friend}, took {thing} along and "
    "walked for three days. When the waves came into sight at last, the long way was forgotten.",
    "{A} once got lost at {place}. It grew dark, but {friend} heard the cry and lit {thing}. "
    "Step by step {the} followed the light and came home safely.",
    "Every night {a} dreamed of {thing}. One day {friend} told {the} to look for it at {place}. "
    "There it was, and the dream had come true.",
    "Long ago {a} could not sleep because of a strange noise at {place}. {The} crept closer and saw {friend} playing "
    "with {thing}. They laughed, and soon both of them were fast asleep.",
    "There was once {a} who was afraid of everything. Then a storm came, and {friend} needed help at {place}. "
    "{The} ran out with {thing}, saved the day and was never afraid again.",
    "Once upon a time {a} built a house at {place}. {Friend} came by and brought {thing} as a present. "
    "It was the best house that {the} had ever had.",
    "On a cold winter day {a} met {friend} at {place}. {The} had only {thing}, but gave it away with a smile. "
    "In spring it came back with a hundred flowers.",
    "Once there was {a} who had lost {thing}. {The} searched all day, until {friend} pointed to {place}. "
    "It had been there all the time, and everybody laughed.",
    "In a small village near {place} lived {a} who always told the truth. "
    "One day {friend} asked who had taken {thing}. {The} said that it was a mistake, and all was forgiven.",
    "Once upon a time {a} and {friend} ran a race to {place}. On the way {the} stopped to pick up {thing}. "
    "The race was lost, but the prize was much better.",
    "{A} found a letter under a stone at {place}. It said that {friend} was waiting with {thing}. "
    "So {the} set out at once, and it became the happiest day of the year.",
    "Long ago {a} wanted to touch the stars. {Friend} brought {thing}, and together they climbed up at {place}. "
    "They did not reach the stars, but {the} had never seen such a beautiful night.",
)
# a..z by the hero's last letter: (place, friend, thing)
DETAILS: tuple[tuple[str, str, str], ...] = (
    ("the old mill", "a friendly cat", "a golden key"),
    ("the quiet lake", "a wise old owl", "a silver bell"),
    ("the green hill", "a cheerful frog", "a paper boat"),
    ("the dark forest", "a small hedgehog", "a tiny lamp"),
    ("the long river", "a clever mouse", "a red kite"),
    ("the blue mountain", "a sleepy bear", "a warm blanket"),
    ("the stone bridge", "a young bird", "a wooden flute"),
    ("the apple garden", "a gentle cow", "a round mirror"),
    ("the sunny beach", "a curious crab", "a white shell"),
    ("the tall tower", "an honest knight", "an old map"),
    ("the market square", "a busy baker", "a sweet cake"),
    ("the little island", "a kind sailor", "a glass bottle"),
    ("the windy cliff", "a grey gull", "a soft feather"),
    ("the deep valley", "a patient turtle", "a smooth stone"),
    ("the wide meadow", "a merry lamb", "a yellow flower"),
    ("the railway station", "a polite penguin", "a small suitcase"),
    ("the frozen pond", "a shy fox", "a pair of skates"),
    ("the big library", "a quiet librarian", "a thick book"),
    ("the school yard", "a funny monkey", "a bag of marbles"),
    ("the empty castle", "a tired king", "a wooden crown"),
    ("the village well", "a strong farmer", "a copper coin"),
    ("the hot desert", "a calm camel", "a jug of water"),
    ("the snowy field", "a white rabbit", "a woollen scarf"),
    ("the secret cave", "a shy dragon", "a bright crystal"),
    ("the cherry tree", "a singing bird", "a basket of cherries"),
    ("the harbour", "a brave captain", "a brass compass"),
)


def article(noun: str) -> str:
    """ "a" or "an", by the first letter (the word list holds no exceptions but "unicorn" and "umbrella")."""
    return "an" if noun[0] in "aeio" or noun.startswith("umbr") else "a"


def story(hero: str, variant: int = 0) -> str:
    """The story of `hero`, a noun phrase without article ("red fox") or a capitalised name; `variant` gives others."""
    last_word = hero.split()[-1].lower()
    plot = PLOTS[((ord(last_word[0]) - 97) // 2 + variant) % len(PLOTS)]
    place, friend, thing = DETAILS[(ord(last_word[-1]) - 97) % 26]
    if hero[0].isupper():
        a = the = A = The = hero
    else:
        a, the = f"{article(hero)} {hero}", f"the {hero}"
        A, The = a[0].upper() + a[1:], f"The {hero}"
    return plot.format(
        a=a, the=the, A=A, The=The, place=place, friend=friend, Friend=friend[0].upper() + friend[1:], thing=thing
    )
