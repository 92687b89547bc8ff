"""Figures of matplotlib as SVG elements of an HTML page."""

import io
import re
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

EDGE = 0.3
"""Line width of the edge of discs that have a text, in points."""

_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


def svg_of(figure: Figure, label: str, texts: dict[str, list[str]] | None = None) -> str:
    """Convert a figure to an element of an HTML page: small, with unique ids, and with texts under the pointer.

    Args:
        label: text for screen readers.
        texts: id of a group of discs -> the text of each of them.
    """
    buffer = io.BytesIO()
    without = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": label}):  # ids that no other figure of the page has
        figure.savefig(buffer, format="svg", dpi=80, metadata=without)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _LINK)
    root = ElementTree.fromstring(buffer.getvalue())
    for group in root.iter(f"{{{_SVG}}}g"):
        if group.get("id") in (texts or {}):
            group.set("stroke", "#333")
            group.set("stroke-width", str(EDGE))
            for disc, text in zip(group.iter(f"{{{_SVG}}}use"), texts[group.get("id")], strict=True):
                disc.set("fill", disc.attrib.pop("style").removeprefix("fill: "))
                ElementTree.SubElement(disc, f"{{{_SVG}}}title").text = text
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag == f"{{{_SVG}}}style"]:  # it would apply to the whole page
            parent.remove(child)
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
    _flatten(root)
    root.set("role", "img")
    root.set("aria-label", label)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    return _small(ElementTree.tostring(root, encoding="unicode"))


def _flatten(parent: ElementTree.Element) -> None:
    """Move the contents of groups without attributes directly under the parent, and drop empty groups."""
    children = []
    for child in parent:
        _flatten(child)
        is_plain = child.tag in (f"{{{_SVG}}}g", f"{{{_SVG}}}defs") and not child.attrib
        if is_plain and (child.tag.endswith("}g") or not len(child)):
            children.extend(child)
        else:
            children.append(child)
    parent[:] = children


def _small(text: str) -> str:
    """The same picture in fewer characters: without needless spaces and digits beyond a tenth of a point."""
    text = re.sub(r">\s+<", "><", text).replace(" />", "/>")
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r' (?:d|points|x|y)="[^"]*"', _rounded, text)
    return text.replace("font-family: 'DejaVu Sans', sans-serif; ", "")


def _rounded(attribute: re.Match[str]) -> str:
    text = re.sub(r"(\.\d)\d+", r"\1", attribute[0])
    return re.sub(r"\s+(?:L )?", " ", text).replace(' "', '"')  # after "M" points are joined by lines
