"""Write the prompts of the recipe `real`: 32 to evaluate on, and 128 others to fit a value head.

    python scripts/make_evidence_prompts.py

Every prompt asks for a few sentences about a topic, in a tone, that contain five given words. One
prompt serves both rewards of `tq_fast.evaluation.evidence`, so that a text that was drawn once can
be scored under both. The two files share words, tones and forms, but no topic and no set of words.
The same seed writes the same files, byte for byte.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "tq_fast" / "evaluation" / "recipes"
SEED = 20405
NUM_WORDS = 5

FORMS = (
    *("short story", "diary entry", "letter to a friend", "postcard home", "note to a neighbour"),
    *("blog post", "paragraph", "message to the family", "column for a local newspaper"),
)
TONES = (
    *("warm", "hopeful", "playful", "calm", "wistful", "proud", "curious", "grateful", "cheerful"),
    *("gentle", "excited", "thoughtful"),
)
# Nouns and verbs of everyday life whose plurals and past tenses are regular, since the reward
# counts regular inflections only.
WORDS = """
lantern bread river ticket ladder blanket whistle garden button candle bridge orange pocket hammer
window carrot kettle mirror basket violin umbrella feather bottle pencil market engine circle
curtain bucket mountain harbour summer cousin doctor teacher farmer sailor baker painter neighbour
island village forest meadow valley tunnel corner station museum kitchen balcony attic cellar
fence gate chimney roof stair drawer cupboard table chair pillow carpet clock radio camera
bicycle tractor wagon ferry anchor compass map letter stamp parcel coin wallet jacket sweater scarf
glove boot ribbon needle thread paint brush shovel rake seed apple pear cherry lemon honey butter
cheese soup pepper onion biscuit sugar spoon plate kitten pony rabbit owl sparrow turtle spider
cloud thunder rainbow breeze shadow sunset storm puddle
laugh borrow repair whisper climb carry promise remember gather follow listen wander invite
discover polish measure return mention cook plant paint visit rescue
"""

EVALUATION_TOPICS = (
    "the first snow of the year",
    "a power cut in a block of flats",
    "a grandmother who learns to swim",
    "moving into an old house by the sea",
    "a lost dog that finds its way home",
    "the last day of a long holiday",
    "a school play where everything goes wrong",
    "opening a small bakery",
    "a night train through the mountains",
    "a picnic in the rain",
    "teaching a child to ride a bike",
    "a library that stays open at night",
    "growing tomatoes on a balcony",
    "a football match between two villages",
    "an old piano bought at an auction",
    "the morning after a storm",
    "a letter that arrives thirty years late",
    "learning to cook for one person",
    "a street musician and a tired crowd",
    "a broken lift in a tall building",
    "spending a week without a phone",
    "a beekeeper and her hives",
    "a birthday party that nobody planned",
    "a ferry crossing in thick fog",
    "repairing a fishing boat",
    "a long walk with an old friend",
    "a museum guard on a quiet afternoon",
    "the smell of a new book",
    "a cat that rules a hotel",
    "waiting for exam results",
    "a market in a small mountain town",
    "camping under the stars",
)

FITTING_TOPICS = (
    # Home and family.
    *("a family dinner that lasts all evening", "painting the living room yellow"),
    *(
        "a baby who will not sleep",
        "sharing a room with a brother",
        "an attic full of old photographs",
    ),
    *("baking a cake for a wedding", "a leaking roof in autumn", "a grandfather's workshop"),
    *(
        "a house with too many clocks",
        "the first evening in a new flat",
        "washing up after a feast",
    ),
    *(
        "a quarrel about the television",
        "sewing curtains for the kitchen",
        "a sister who moves abroad",
    ),
    *("twins who swap places", "a recipe handed down for generations"),
    *("a garden shed turned into an office", "an uncle who collects stamps"),
    # Work and school.
    *("the first day in a new job", "a teacher's last lesson", "a nurse on the night shift"),
    *(
        "a postman in a hilly town",
        "a meeting that could have been short",
        "a bus driver's morning",
    ),
    *("a baker who rises at three", "a school trip to a castle", "learning to read music"),
    *(
        "a carpenter and a crooked table",
        "a lost homework book",
        "a hairdresser who hears everything",
    ),
    *("a firefighter's day off", "an office plant that will not die", "a chess club for beginners"),
    *("a tailor and a fussy customer", "the end of the school year", "a farmer waiting for rain"),
    *("a young doctor in a village", "a lighthouse keeper's routine"),
    # Nature and weather.
    *("the first warm day of spring", "a fox in the back garden", "a river in flood"),
    *("a heat wave in the city", "mushrooms in the forest", "swallows that return"),
    *("a tree that is older than the town", "a thunderstorm at sea"),
    *(
        "a field of sunflowers",
        "watching the tide come in",
        "a lost hedgehog",
        "a rainbow over the motorway",
    ),
    *("a walk through fallen leaves", "owls in the barn", "a windy beach", "planting a hedge"),
    *("a pond full of frogs", "the quiet of a snowy morning", "a wasp at the breakfast table"),
    # Travel.
    *("missing the last bus", "a suitcase that went to the wrong city", "a hostel with thin walls"),
    *("asking for directions abroad", "a road trip in an old van", "a flight delayed by fog"),
    *("a map with a mistake", "a hike to a waterfall", "a taxi driver with many stories"),
    *("an island without cars", "a first visit to the ocean", "a tent that blows away"),
    *("a sleepy border town", "a boat trip along the canals", "a cable car above the valley"),
    *(
        "coming home after a year away",
        "a postcard from an unknown place",
        "a hotel without guests",
    ),
    *("cycling across the country", "a train ride with a stranger"),
    # Food.
    *("a soup for a cold day", "picking cherries with cousins", "a restaurant with one table"),
    *("the worst pancakes ever made", "a cheese that smells of socks", "a stall of fresh oranges"),
    *("making jam in August", "a coffee shop on a rainy corner", "learning to bake bread"),
    *("a feast after the harvest", "an ice cream van in winter"),
    # Hobbies and sport.
    *("learning the violin at fifty", "a marathon run in a costume"),
    *("an amateur astronomer", "a choir without a tenor", "a swimming race across the bay"),
    *("building a kite", "a model railway in the cellar", "a dance class for beginners"),
    *("a tennis match that will not end", "a village brass band", "restoring an old bicycle"),
    *("birdwatching at dawn", "a painting that hangs upside down", "a skating lesson"),
    *("a book club that never reads the book", "a treasure hunt in the park"),
    # Town and neighbours.
    *("a neighbour who plays the drums", "a street party in June", "a bench with a view"),
    *("the closing of an old cinema", "a flea market find", "a statue that nobody likes"),
    *("a community garden", "a town without traffic lights", "a bridge painted overnight"),
    *(
        "a shop that sells only umbrellas",
        "a stray cat with three homes",
        "a fountain that runs dry",
    ),
    *("fireworks seen from the roof", "a mayor who cycles to work", "an empty playground"),
    *("the corner shop at midnight", "a new tram line", "a clock tower that is always late"),
    *("a ladder left against a wall", "an unexpected parcel", "a talkative parrot"),
    *("a rescued donkey", "a puppy's first winter", "a goldfish at the fair"),
)


def make_prompts(topics: tuple[str, ...], rng: random.Random) -> list[str]:
    """Return one prompt a topic; forms and tones go round, words are drawn."""
    words = sorted(set(WORDS.split()))
    # Shuffled rounds use every form and every tone about equally often.
    forms = _rounds(FORMS, len(topics), rng)
    tones = _rounds(TONES, len(topics), rng)
    prompts = []
    for topic, form, tone in zip(topics, forms, tones, strict=True):
        named = {*topic.split(), *form.split()}
        chosen = rng.sample([word for word in words if word not in named], NUM_WORDS)
        article = "an" if tone[0] in "aeiou" else "a"
        listed = f"{', '.join(chosen[:-1])} and {chosen[-1]}"
        prompts.append(
            f"Write a {form} about {topic}, in {article} {tone} tone. Use three or four sentences "
            f"and all of these words: {listed}."
        )
    return prompts


def _rounds(items: tuple[str, ...], num: int, rng: random.Random) -> list[str]:
    drawn: list[str] = []
    while len(drawn) < num:
        drawn += rng.sample(items, len(items))
    return drawn[:num]


def write_prompts(folder: Path = FOLDER) -> None:
    """Write `real-evaluation.jsonl` and `real-fitting.jsonl` into `folder`."""
    rng = random.Random(SEED)
    for name, topics in (("evaluation", EVALUATION_TOPICS), ("fitting", FITTING_TOPICS)):
        lines = [
            json.dumps({"id": f"{name}-{index}", "prompt": prompt})
            for index, prompt in enumerate(make_prompts(topics, rng))
        ]
        path = folder / f"real-{name}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_prompts()
