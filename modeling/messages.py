"""OpenAI-style `messages`, and the `texts` pairs of Hugging Face sets, as turns {from, value}.

A message's content is text, or a list of parts in which pictures and videos stand where they are shown: each leaves its
placeholder, on a line of its own, and several pictures of a message are named `Image-1: <image>` as the paper does
(arXiv 2412.05271, §3.1). A part that only says where a picture stands ({type: image}) is one of `images`, in order.
Where the content is text, placeholders are the author's business.
"""

from typing import Any

ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}
PICTURES, VIDEOS = ("image", "image_url", "input_image"), ("video", "video_url", "input_video")

Named = list[tuple[str, Any]]  # (image | video, what the part gives)


def turns_of(messages: Any) -> tuple[Any, Named] | str:
    """(turns, media inside them) or what is wrong. What is no message is passed on as it is, to be told by role."""
    if not isinstance(messages, list):
        return messages, []
    total = sum(len(_parts(message, PICTURES)) for message in messages)
    turns: list[Any] = []
    named: Named = []
    shown = 0
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"message {number} must be {{role, content}}, found {str(message)[:80]!r}"
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list):
            text = ""
            for part in content:
                kind = part.get("type") if isinstance(part, dict) else None
                if kind in ("text", "input_text") and isinstance(part.get("text"), str):
                    text += part["text"]
                elif kind in PICTURES:
                    shown += 1
                    if (given := _given(part, kind)) is not None:
                        named.append(("image", given))
                    text += (f"Image-{shown}: " if total > 1 else "") + "<image>\n"
                elif kind in VIDEOS:
                    if (given := _given(part, kind)) is not None:
                        named.append(("video", given))
                    text += "<video>\n"
                else:
                    return f"message {number} has a part of type {kind!r}: text, image, image_url or video"
            content = text
        if not isinstance(content, str):
            return f"message {number} must have text as its content, found {str(content)[:80]!r}"
        turns.append({"from": ROLES.get(str(role), role), "value": content})
    return turns, named


def pairs_of(texts: Any, data: dict[str, Any]) -> tuple[Any, Named] | str:
    """Turns of [{user, assistant}], the pictures of `images` in front of the first question."""
    if not isinstance(texts, list):
        return texts, []
    turns = []
    for number, pair in enumerate(texts, 1):
        if not isinstance(pair, dict) or not all(isinstance(pair.get(key), str) for key in ("user", "assistant")):
            return f"pair {number} of `texts` must be {{user, assistant}} with text, found {str(pair)[:80]!r}"
        turns += [{"from": "human", "value": pair["user"]}, {"from": "gpt", "value": pair["assistant"]}]
    images = data.get("images")
    count = len(images) if isinstance(images, list) else 0
    if turns and count and not any("<image>" in turn["value"] for turn in turns):
        tags = [f"Image-{i}: " if count > 1 else "" for i in range(1, count + 1)]
        turns[0]["value"] = "".join(f"{tag}<image>\n" for tag in tags) + turns[0]["value"]
    return turns, []


def _parts(message: Any, kinds: tuple[str, ...]) -> list[Any]:
    content = message.get("content") if isinstance(message, dict) else None
    return (
        [part for part in content if isinstance(part, dict) and part.get("type") in kinds]
        if isinstance(content, list)
        else []
    )


def _given(part: dict[str, Any], kind: str) -> Any:
    """{type: image, image: …}, {type: image_url, image_url: {url: …}}, …: what stands under the type's own name."""
    given = part.get(kind, part.get(kind.removesuffix("_url").removeprefix("input_")))
    return given.get("url", given) if isinstance(given, dict) else given
