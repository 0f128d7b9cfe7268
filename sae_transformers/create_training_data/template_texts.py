"""Templates that a model reads texts in: with `{text}`, or one of ours by name. No torch is imported here: the command
line uses it too."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACEHOLDER = "{text}"
TASKS = {
    "toxicity": "Someone sent the message below to a chat assistant. Decide whether it asks for anything unsafe: "
    "violence, other crimes, sexual crimes, defamation, stolen work, invasion of privacy, hatred, self-harm or "
    "pornography.\n\nMessage: {text}",
    "helpfulness": "Below is a conversation between a person and an assistant. Rate from 1 to 10 how well the "
    "assistant helps the person with what was asked.\n\nConversation: {text}",
    "disease": "Below a patient tells a doctor of symptoms. As an experienced doctor, name the disease that explains "
    "them best.\n\nDialogue: {text}",
}


def check_template(template: str) -> None:
    """Raise ValueError unless a template is one of `TASKS` or has `{text}` once."""
    if template not in TASKS and template.count(PLACEHOLDER) != 1:
        raise ValueError(
            f"`template` must have {PLACEHOLDER} once, or be one of {', '.join(TASKS)}. "
            f"Received: template={template!r}."
        )


def full_template(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A template with `{text}` once: as it was given; or of a task by name, as a user's turn of the tokenizer's chat,
    up to where the answer would begin.

    The tasks are those of SelfReg (https://huggingface.co/papers/2502.14133), in words of our own.

    Raises:
        ValueError: it is neither, or the chat leaves the text out or repeats it.
    """
    check_template(template)
    if template not in TASKS:
        return template
    if not tokenizer.chat_template:
        return TASKS[template]
    turn = [{"role": "user", "content": TASKS[template]}]
    whole = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    if not isinstance(whole, str) or whole.count(PLACEHOLDER) != 1:
        raise ValueError(f"The tokenizer's chat template must take a user's turn once. Received: {whole!r}.")
    return whole
