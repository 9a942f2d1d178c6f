"""Draw a scene: PIL image, pixel boxes and, on request, a mask of object numbers."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from encoders.data.scenes.emoji_classes import EmojiClass, rasterise
from encoders.data.scenes.world import BACKGROUNDS, WORD_ROWS, Scene

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels; x1 and y1 lie outside
OPAQUE = 128  # alpha from which a pixel belongs to an object
SPRITES_KEPT = 8192


@dataclass(frozen=True)
class Picture:
    """A drawn scene: an RGB image, one box per object, the box of the printed word, a mask (0, or object + 1)."""

    image: Image.Image
    boxes: list[Box]
    word_box: Box | None
    mask: Image.Image | None


class Renderer:
    """Draws scenes at one image size; drawings of objects and words are kept once made."""

    def __init__(self, classes: list[EmojiClass], image_size: int, masks: bool = False) -> None:
        self.image_size = image_size
        self.masks = masks
        self._characters = {one.name: one.characters for one in classes}
        self._sprites: dict[tuple[str, int], Image.Image] = {}
        self._fonts: dict[int, ImageFont.FreeTypeFont | ImageFont.ImageFont] = {}

    def draw(self, scene: Scene) -> Picture:
        """Draw one scene, objects in order."""
        size = self.image_size
        image = Image.new("RGB", (size, size), BACKGROUNDS[scene.background])
        mask = np.zeros((size, size), np.uint8) if self.masks else None
        boxes = []
        for number, thing in enumerate(scene.objects, start=1):
            sprite = self._sprite(thing.name, round(thing.side * size))
            x, y = round(thing.x * size - sprite.width / 2), round(thing.y * size - sprite.height / 2)
            image.paste(sprite, (x, y), sprite)
            boxes.append((x, y, x + sprite.width, y + sprite.height))
            if mask is not None:
                region = mask[y : y + sprite.height, x : x + sprite.width]
                region[np.asarray(sprite.getchannel("A")) >= OPAQUE] = number
        word_box = self._print(image, scene) if scene.word is not None else None
        return Picture(image, boxes, word_box, Image.fromarray(mask) if mask is not None else None)

    def _sprite(self, name: str, side: int) -> Image.Image:
        """The drawing of a class whose longer side is `side` px."""
        if (name, side) not in self._sprites:
            if len(self._sprites) >= SPRITES_KEPT:
                self._sprites.clear()
            drawing = rasterise(self._characters[name], max(128, 2 * side))
            scale = side / max(drawing.size)
            width, height = (max(1, round(length * scale)) for length in drawing.size)
            self._sprites[name, side] = drawing.resize((width, height), Image.Resampling.LANCZOS)
        return self._sprites[name, side]

    def _print(self, image: Image.Image, scene: Scene) -> Box:
        """Print the scene's word in black capitals, centred in its row; returns the box of its ink."""
        assert scene.word is not None
        assert scene.word_place is not None
        top, bottom = (edge * self.image_size for edge in WORD_ROWS[scene.word_place])
        pixels = round((bottom - top) * 1.15)  # capitals fill about 0.7 of a font's height
        if pixels not in self._fonts:
            self._fonts[pixels] = ImageFont.load_default(pixels)
        pen, centre, font = ImageDraw.Draw(image), (self.image_size / 2, (top + bottom) / 2), self._fonts[pixels]
        pen.text(centre, scene.word.upper(), fill="black", font=font, anchor="mm")
        left, upper, right, lower = pen.textbbox(centre, scene.word.upper(), font=font, anchor="mm")
        return int(left), int(upper), int(right) + 1, int(lower) + 1
