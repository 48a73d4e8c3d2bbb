from p2p.identity import create_identity
from p2p.libp2p_network import open_libp2p_network
from p2p.directory import Directory
import trio, time

LO = ("/ip4/127.0.0.1/tcp/0",)

async def test_it():
    async with open_libp2p_network(create_identity(), listen=LO) as a:
        boot = (f"{a.addresses[0]}/p2p/{a.peer}",)
        async with open_libp2p_network(create_identity(), listen=LO, bootstrap=boot) as b, open_libp2p_network(create_identity(), listen=LO, bootstrap=boot) as c:
            d = [Directory(n) for n in (a, b, c)]
            t=time.time()
            for n, x in enumerate(d):
                print(await x.publish(b"k"*32, b"hello%d" % n, ttl_s=30, sequence=1), time.time()-t)
            for x in d:
                print([r.body for r in await x.lookup(b"k"*32)], time.time()-t)
            print(await b.ping(c.peer), await b.ping(b.peer), b.round_trip_s(c.peer))
            print(b.connected_peers())
