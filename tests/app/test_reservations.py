import asyncio

from dinat.app.reservations import OLDEST_EVERY, Reservations


def test_cheapest_work_is_first_and_units_are_limited() -> None:
    async def test() -> None:
        reservations = Reservations(2, 100)
        running: list[str] = []
        release = {name: asyncio.Event() for name in ("large", "huge", "small", "cancelled", "medium")}

        async def reserve(name: str, units: int) -> None:
            async with reservations.reserve(units, units):
                running.append(name)
                await release[name].wait()
                running.remove(name)

        async def settle() -> None:
            for _ in range(5):
                await asyncio.sleep(0)

        sizes = {"large": 60, "huge": 100, "small": 10, "cancelled": 20, "medium": 50}
        tasks = {}
        for name, units in sizes.items():
            tasks[name] = asyncio.create_task(reserve(name, units))
            await settle()
        assert running == ["large", "small"]
        tasks["cancelled"].cancel()
        release["small"].set()
        await settle()
        assert running == ["large"]  # medium does not fit beside it
        release["large"].set()
        await settle()
        assert running == ["medium"]
        tasks["medium"].cancel()
        await settle()
        assert running[-1] == "huge"
        release["huge"].set()
        await tasks["huge"]

    asyncio.run(test())


def test_stream_of_cheap_work_does_not_exclude_what_costs_more() -> None:
    async def test() -> None:
        reservations, order = Reservations(1), list[int]()

        async def work(cost: int) -> None:
            async with reservations.reserve(cost):
                order.append(cost)
                await asyncio.sleep(0)

        await asyncio.gather(*(work(cost) for cost in (1, 1000, *[1] * 20)))
        assert order.index(1000) == OLDEST_EVERY - 1

    asyncio.run(test())
