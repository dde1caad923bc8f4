// HEAD and TAIL of the guard around a graph that an engine built in C++, as child nodes.
//
//   c++ -std=c++17 -shared -fPIC -I$CUDA_HOME/include child_nodes.cpp -lcuda -o libchild_nodes.so
//
// `manager.graphs(batch)` in Python gives `head` and `tail`; they are copied here and may be closed afterwards. The engine
// launches the result once per forward, between `manager.begin_step(stream)` and `manager.end_step()`.
#include <cuda.h>

extern "C" CUresult kvc_guard_graph(CUgraph head, CUgraph model, CUgraph tail, CUgraphExec* guarded) {
    CUgraph graph = nullptr;
    CUgraphNode before, around, behind;
    CUresult status = cuGraphCreate(&graph, 0);
    if (status == CUDA_SUCCESS) status = cuGraphAddChildGraphNode(&before, graph, nullptr, 0, head);
    if (status == CUDA_SUCCESS) status = cuGraphAddChildGraphNode(&around, graph, &before, 1, model);
    if (status == CUDA_SUCCESS) status = cuGraphAddChildGraphNode(&behind, graph, &around, 1, tail);
    if (status == CUDA_SUCCESS) status = cuGraphInstantiate(guarded, graph, 0);
    if (graph) cuGraphDestroy(graph);
    return status;
}
