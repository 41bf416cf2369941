"""A fixed set of tasks whose answers repeat much of their prompts: quote, edit, extend.

The texts are short and ours, so that a model of 135 M parameters can do what is asked.
"""

from __future__ import annotations

TEXTS = {
    "harbour": (
        "The harbour of Lenz opens to the north. In winter the ferries leave at seven in the morning and "
        "come back after dark, and the pilots keep a fire in the small stone house at the end of the "
        "pier. When the wind turns to the east, the fishing boats stay in, and the harbour master writes "
        "the date and the hour in a green book that lies on his desk. The book has been kept since 1874, "
        "and nobody has ever torn out a page."
    ),
    "bread": (
        "Mix 500 grams of flour with 350 grams of water and leave the dough for thirty minutes. Add 10 "
        "grams of salt and 100 grams of ripe starter, and fold the dough four times in the first two "
        "hours. Let it rise until it has grown by half, shape it into a round loaf, and put it in a "
        "basket with a floured cloth. Bake it in a hot pot for twenty minutes with the lid on and for "
        "twenty-five minutes with the lid off."
    ),
    "letter": (
        "Dear Ms. Alvarez, thank you for your order of 3 May. We have packed twelve boxes of the blue "
        "tiles and four boxes of the white tiles, and the driver will bring them on Thursday between "
        "nine and eleven. Please check the number on each box before you sign. If a box is damaged, "
        "write it on the paper of the driver and send us a photograph on the same day. With kind "
        "regards, Jonas Weber, Weber and Daughters."
    ),
    "rules": (
        "1. The library is open from Monday to Saturday. 2. A reader may borrow six books for four "
        "weeks. 3. A book that another reader has asked for cannot be renewed. 4. Maps, newspapers and "
        "the large atlas stay in the reading room. 5. Whoever loses a book pays its price and two coins "
        "for the work. 6. Dogs wait at the door, where there is water for them."
    ),
}
CODE = {
    "total": '''def total_price(items, tax_rate):
    """Return the price of all items with tax."""
    total = 0.0
    for item in items:
        price = item["price"] * item["quantity"]
        if item.get("discount"):
            price = price - item["discount"]
        total = total + price
    return round(total * (1.0 + tax_rate), 2)
''',
    "stack": """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

    def peek(self):
        if not self.items:
            raise IndexError("peek at an empty stack")
        return self.items[-1]

    def size(self):
        return len(self.items)
""",
    "words": """def count_words(path):
    counts = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            for word in line.lower().split():
                word = word.strip(".,;:!?")
                if word:
                    counts[word] = counts.get(word, 0) + 1
    return sorted(counts.items(), key=lambda pair: pair[1], reverse=True)
""",
}


def prompts() -> list[str]:
    """Twelve tasks."""
    quote = "Repeat the following text word for word, and write nothing else.\n\n{}"
    found = [quote.format(text) for text in TEXTS.values()]
    found += [
        f"Quote this function exactly as it is.\n\n```python\n{code}```" for code in CODE.values()
    ]
    found += [
        f"Rewrite this text with the year 1874 changed to 1902. Change nothing else.\n\n{TEXTS['harbour']}",
        f"Rewrite this letter for Mr. Okafor instead of Ms. Alvarez.\n\n{TEXTS['letter']}",
        f"Copy these rules, each on its own line.\n\n{TEXTS['rules']}",
        f"Add a docstring to this function and return all of it.\n\n```python\n{CODE['words']}```",
        f"Rename the class to Pile and return all of the code.\n\n```python\n{CODE['stack']}```",
    ]
    return found
