"""What a stand-in for a node answers its peers, where only swarm and exchange are tried."""


class Answers:
    """transport.Handler by ``self.swarm`` and ``self.exchange``."""

    async def hello(self, request, source):
        return await self.swarm.answer_hello(request, source)

    async def open_visit(self, request):
        return self.exchange.answer_offer(request)

    async def settle_visit(self, request):
        return self.exchange.answer_degree(request)

    def pull(self, request):
        return self.exchange.answer_pull(request)

    async def goodbye(self, request):
        self.swarm.answer_goodbye(request)
