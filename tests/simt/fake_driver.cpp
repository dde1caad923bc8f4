// As much of libcuda as examples/cpp/child_nodes.cpp calls: graphs of child nodes, instantiated in the order of their edges.
#include <cuda.h>

#include <cstdint>
#include <vector>

struct CUgraphNode_st {
    CUgraph child;
    std::vector<CUgraphNode> before;
};
struct CUgraph_st {
    std::vector<CUgraphNode> nodes;
};
struct CUgraphExec_st {
    std::vector<CUgraph> children;
};

extern "C" {
CUresult cuGraphCreate(CUgraph* graph, unsigned) {
    *graph = new CUgraph_st;
    return CUDA_SUCCESS;
}
CUresult cuGraphDestroy(CUgraph graph) {
    for (CUgraphNode node : graph->nodes) delete node;
    delete graph;
    return CUDA_SUCCESS;
}
CUresult cuGraphAddChildGraphNode(CUgraphNode* node, CUgraph graph, const CUgraphNode* before, size_t n, CUgraph child) {
    if (!child) return CUDA_ERROR_INVALID_VALUE;
    *node = new CUgraphNode_st{child, {before, before + n}};
    graph->nodes.push_back(*node);
    return CUDA_SUCCESS;
}
// One chain alone: every node but the first waits for the one before it.
CUresult cuGraphInstantiate(CUgraphExec* exec, CUgraph graph, unsigned long long) {
    *exec = new CUgraphExec_st;
    CUgraphNode last = nullptr;
    for (CUgraphNode node : graph->nodes) {
        if (node->before != (last ? std::vector<CUgraphNode>{last} : std::vector<CUgraphNode>{})) return CUDA_ERROR_NOT_SUPPORTED;
        (*exec)->children.push_back(node->child);
        last = node;
    }
    return CUDA_SUCCESS;
}
// The children of an instantiated graph, in the order in which they run; returns how many.
int fake_children(CUgraphExec exec, uint64_t* handles) {
    int n = 0;
    for (CUgraph child : exec->children) handles[n++] = (uint64_t)(uintptr_t)child;
    return n;
}
}
