# ruff: noqa: E501 (a passage is a line)
"""The same two sentences in many languages, and some code: what lab 01 counts tokens on.

Hides: nothing. The control is the English with its letters in random order: the same letters, no words.
"""

from __future__ import annotations

import random

ENGLISH = (
    "Every evening the old woman told the children a story by the fire. "
    "They asked for one more, and she never said no."
)
LANGUAGES = (
    (
        "Spanish",
        "Cada noche la anciana contaba a los niños un cuento junto al fuego. Pedían otro más, y ella nunca decía que no.",
    ),
    (
        "French",
        "Chaque soir, la vieille femme racontait une histoire aux enfants près du feu. Ils en demandaient encore une, et elle ne disait jamais non.",
    ),
    (
        "German",
        "Jeden Abend erzählte die alte Frau den Kindern am Feuer eine Geschichte. Sie baten um noch eine, und sie sagte nie nein.",
    ),
    (
        "Turkish",
        "Yaşlı kadın her akşam ateşin başında çocuklara bir hikâye anlatırdı. Bir tane daha isterlerdi, o da hiç hayır demezdi.",
    ),
    (
        "Swahili",
        "Kila jioni bibi mzee aliwasimulia watoto hadithi karibu na moto. Waliomba moja zaidi, naye hakukataa kamwe.",
    ),
    (
        "Russian",
        "Каждый вечер старая женщина рассказывала детям сказку у огня. Они просили ещё одну, и она никогда не отказывала.",
    ),
    (
        "Greek",
        "Κάθε βράδυ η γριά έλεγε στα παιδιά μια ιστορία δίπλα στη φωτιά. Ζητούσαν άλλη μία, κι εκείνη ποτέ δεν έλεγε όχι.",
    ),
    (
        "Arabic",
        "كل مساء كانت المرأة العجوز تحكي للأطفال قصة بجانب النار. كانوا يطلبون قصة أخرى، ولم تقل لا أبدا.",
    ),
    (
        "Hindi",
        "हर शाम बूढ़ी औरत आग के पास बच्चों को एक कहानी सुनाती थी। वे एक और माँगते, और वह कभी मना नहीं करती थी।",
    ),
    ("Chinese", "每天晚上，老婆婆都在火堆旁给孩子们讲一个故事。他们总要再听一个，她从来不说不。"),
    (
        "Japanese",
        "毎晩、おばあさんは火のそばで子どもたちに物語を聞かせました。もう一つとせがまれると、決して断りませんでした。",
    ),
    (
        "Korean",
        "매일 저녁 할머니는 불가에서 아이들에게 이야기를 들려주었다. 하나만 더 해 달라고 하면 한 번도 거절하지 않았다.",
    ),
)
CODE = (
    (
        "Python",
        "def total(prices, tax=0.07):\n    subtotal = sum(price for price in prices if price > 0)\n    return round(subtotal * (1 + tax), 2)\n",
    ),
    (
        "JSON",
        '{"id": 48213, "name": "Ada", "tags": ["new", "paid"], "address": {"city": "Turin", "zip": "10121"}}',
    ),
    (
        "HTML",
        '<ul class="menu">\n  <li><a href="/start">Start</a></li>\n  <li><a href="/about">About us</a></li>\n</ul>\n',
    ),
    ("Numbers", "3.14159 2.71828 1.41421 1,000,000 65,536 2026-11-24 12:30 +44 20 7946 0958"),
)


def shuffle_letters(text: str, seed: int = 0) -> str:
    """Return the text with its letters in random order; spaces and punctuation stay where they are."""
    letters = [char for char in text.lower() if char.isalpha()]
    random.Random(seed).shuffle(letters)
    return "".join(letters.pop() if char.isalpha() else char for char in text)


def list_passages() -> list[tuple[str, str, str]]:
    """Return (name, group, text) of every passage, the English first."""
    return [
        ("English", "The same two sentences", ENGLISH),
        *((name, "The same two sentences", text) for name, text in LANGUAGES),
        (
            "English, letters shuffled",
            "Control: the same letters, no words",
            shuffle_letters(ENGLISH),
        ),
        *((name, "Code and numbers", text) for name, text in CODE),
    ]
