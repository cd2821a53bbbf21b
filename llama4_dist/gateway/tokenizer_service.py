"""TokenizerService: the same encoding and decoding that generation uses."""

import asyncio

from llama4_dist.gateway.handlers import Context
from llama4_dist.gateway.prompt import INLINE_CHARS, check_model, encode_messages, encode_text, without_tokenizer
from llama4_dist.request import EngineLimits
from llama4_dist.rpc.wire import messages_from_proto
from llama4_dist.text.tokenizer import Tokenizer
from llama4_dist.v1 import tokenizer_pb2
from llama4_dist.validation import check_token_ids


class TokenizerService:
    """The public methods; names are the service's own."""

    def __init__(self, tokenizer: Tokenizer | None, limits: EngineLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits

    async def Tokenize(
        self, request: tokenizer_pb2.TokenizeRequest, context: Context
    ) -> tokenizer_pb2.TokenizeResponse:
        """Encode text."""
        check_model(request.model, self._limits)
        add_bos = request.add_special_tokens if request.HasField("add_special_tokens") else True
        token_ids = await encode_text(request.text, self._tokenizer, self._limits, add_bos=add_bos)
        return tokenizer_pb2.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self, request: tokenizer_pb2.DetokenizeRequest, context: Context
    ) -> tokenizer_pb2.DetokenizeResponse:
        """Decode tokens."""
        check_model(request.model, self._limits)
        check_token_ids("token_ids", request.token_ids, self._limits.vocab_size)
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        text = await self._decode(tuple(request.token_ids), skip_special_tokens=skip)
        return tokenizer_pb2.DetokenizeResponse(text=text)

    async def ApplyChatTemplate(
        self, request: tokenizer_pb2.ApplyChatTemplateRequest, context: Context
    ) -> tokenizer_pb2.ApplyChatTemplateResponse:
        """Render a chat."""
        check_model(request.model, self._limits)
        with_prompt = request.add_generation_prompt if request.HasField("add_generation_prompt") else True
        token_ids = await encode_messages(
            messages_from_proto(request.messages), self._tokenizer, self._limits, add_generation_prompt=with_prompt
        )
        text = await self._decode(token_ids, skip_special_tokens=False)
        return tokenizer_pb2.ApplyChatTemplateResponse(token_ids=token_ids, text=text)

    async def _decode(self, token_ids: tuple[int, ...], *, skip_special_tokens: bool) -> str:
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise without_tokenizer("text")

        def decode() -> str:
            return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

        return await asyncio.to_thread(decode) if len(token_ids) > INLINE_CHARS else decode()
